"""The parts of ``scripts/mutants.py``: what is changed, which tests cover it, and how they are run."""
