"""The command: one thin module per verb."""
