"""The command: one thin module per verb, whose function bears the verb's name.

Beside it a module may hold ``HELPS`` (what options of its flag groups say to this verb's users) and ``SETTINGS``
(Typer's context settings). Jobs are imported inside the verbs, so that ``--help`` needs neither torch nor transformers.
"""
