"""Baseline EAN: expert activation norm.

Source: arXiv 2504.05586, "Finding Fantastic Experts in MoEs: A Unified Study for Expert Dropping Strategies and
Observations"; a baseline of arXiv 2510.13999 as well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace


@register("ean", needs=("norm",))
def ean(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Sum of output norms over routed tokens: ``sum_t |E_i|``, gates ignored.

    Args:
        trace: a trace with output norms.
        options: how much tokens count.

    Returns:
        float64 [L, E], in units of hidden states.

    Raises:
        UsageError: when the trace holds no output norms.
    """
    return trace.sums("norm", options.weights)
