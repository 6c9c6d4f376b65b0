"""Scorers: pure functions that turn a trace into one number per (layer, expert)."""
