"""A rule: the better half of every layer first, then whatever is worth most, wherever it is."""

from __future__ import annotations

import numpy as np

from shape_moe.selection.rules import Priority, Values, layer_ranks, register


@register("top-half-first")
def top_half_first(values: Values, tiebreak: Values | None = None) -> Priority:
    """Experts of the better half of their layer come before all others; within both, the larger value first.

    Args:
        values: float [L, E].
        tiebreak: float [L, E], decides between equal values, None for nothing.

    Returns:
        float64 [L, E], smaller is kept first: minus the value's share of the largest one, plus 2 in the worse half.
    """
    values = np.asarray(values, dtype=np.float64)
    largest = np.abs(values).max()
    share = values / largest if largest > 0 else values
    worse = layer_ranks(values, tiebreak) >= values.shape[1] / 2
    return np.asarray(-share + np.where(worse, 2.0 + 1e-9, 0.0))
