"""Baseline REAP: mean gated output norm over the tokens that were routed to an expert.

Source: arXiv 2510.13999, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression". Since March 2026 its
authors renormalise gate weights over the top-k; the name without suffix does as they do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace


@register("reap", needs=("gated_norm_renormalised", "tokens"))
def reap(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Mean of ``g |E_i|`` over routed tokens, with g renormalised over the top-k (the authors' current form).

    Args:
        trace: a trace with output norms.
        options: how much tokens count.

    Returns:
        float64 [L, E], in units of hidden states; 0 for experts that were never routed to.

    Raises:
        UsageError: when the trace holds no output norms.
    """
    return _mean("gated_norm_renormalised", trace, options)


@register("reap-received", needs=("gated_norm", "tokens"))
def reap_received(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Mean of ``g |E_i|`` over routed tokens, with g as the experts module received it.

    Args:
        trace: a trace with output norms.
        options: how much tokens count.

    Returns:
        float64 [L, E], in units of hidden states; 0 for experts that were never routed to.

    Raises:
        UsageError: when the trace holds no output norms.
    """
    return _mean("gated_norm", trace, options)


def _mean(name: str, trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    tokens = trace.sums("tokens", options.weights)
    return np.divide(trace.sums(name, options.weights), tokens, out=np.zeros_like(tokens), where=tokens > 0)
