"""Baseline EASY-EP: output-aware importance times the turn that the routed experts give the residual stream.

Source: arXiv 2504.06792, "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations".
The similarity is that of the residual stream before and after the routed experts, shared experts left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace


@register("easy-ep", needs=("gated_norm_turned",))
def easy_ep(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Gated output norms weighted by how far the token turns: ``sum_t (1 - cos(h, h + y)) g |E_i|``.

    Args:
        trace: a trace with output norms and residual streams.
        options: how much tokens count.

    Returns:
        float64 [L, E], in units of hidden states.

    Raises:
        UsageError: when the trace does not hold the statistic.
    """
    return trace.sums("gated_norm_turned", options.weights)
