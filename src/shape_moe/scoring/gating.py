"""Baseline: how much gate weight an expert receives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace


@register("gating", needs=("gate",))
def gating(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Gate weight received: ``sum_t g``, as the experts module received it.

    Args:
        trace: a trace with gate weights.
        options: how much tokens count.

    Returns:
        float64 [L, E].

    Raises:
        UsageError: when the trace holds no gate weights.
    """
    return trace.sums("gate", options.weights)


@register("gating-renormalised", needs=("gate_renormalised",))
def gating_renormalised(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Gate weight renormalised over the top-k: ``sum_t g / sum_topk g``.

    Args:
        trace: a trace with gate weights.
        options: how much tokens count.

    Returns:
        float64 [L, E], in tokens.

    Raises:
        UsageError: when the trace holds no gate weights.
    """
    return trace.sums("gate_renormalised", options.weights)
