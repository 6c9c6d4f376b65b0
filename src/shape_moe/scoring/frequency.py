"""Baseline: how often an expert is routed to.

Source: the usage-frequency criterion that arXiv 2504.05586 and 2510.13999 compare with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace


@register("frequency", needs=("tokens",))
def frequency(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Tokens routed to each expert: ``sum_t 1``.

    Args:
        trace: any trace.
        options: how much tokens count.

    Returns:
        float64 [L, E], in tokens.
    """
    return trace.sums("tokens", options.weights)
