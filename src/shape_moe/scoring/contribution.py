"""The contribution game: what each expert adds to its layer's output, as an exact Shapley value.

Per token, ``v_t(S) = |y_t|^2 - |y_t - sum_{i in S} a[t,i]|^2`` says how much of the routed output the experts in ``S``
account for. Expanding the square shows that ``v_t`` is a sum of one- and two-player games, so the Shapley value needs
no sampling: it is the inner product ``<a[t,i], y_t>``, of which traces hold the sums. They are the row sums of the
layer's Gram matrix ``G = sum_t a_t a_t^T``, and ``sum_{i,j in R} G[i,j]`` is the squared output change when the set
``R`` is dropped.

Source: this project; docs/method.md derives it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.token_weights import PredictingWeights
from shape_moe.tracing.trace import Trace


@register("contribution", needs=("contribution_relative",), weights=PredictingWeights())
def contribution(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Shapley value of each expert's contribution, relative to the residual stream: ``sum_t <a_i, y> / |h|^2``.

    Args:
        trace: a trace with contributions.
        options: how much tokens count.

    Returns:
        float64 [L, E], without unit; negative where an expert works against the others.

    Raises:
        UsageError: when the trace holds no contributions.
    """
    return trace.sums("contribution_relative", options.weights)


@register("contribution-raw", needs=("contribution",), weights=PredictingWeights())
def contribution_raw(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Shapley value of each expert's contribution: ``sum_t <a_i, y>``.

    Args:
        trace: a trace with contributions.
        options: how much tokens count.

    Returns:
        float64 [L, E], in squared units of hidden states.

    Raises:
        UsageError: when the trace holds no contributions.
    """
    return trace.sums("contribution", options.weights)
