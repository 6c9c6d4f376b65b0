"""Traces: what one calibration pass leaves behind, and what fills them."""
