"""Selections: scores become a priority, a budget is spent, and every layer keeps its experts."""
