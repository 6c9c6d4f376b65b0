r"""Replacement: what each expert's absence changes, once the router has taken its next choice.

Without expert ``i`` the router serves a token by ``B = A \ {i} + {n}``, ``n`` its own (k+1)-th choice, with its own
weights ``g'``. What the layer's routed output moves by is what the expert is worth: little where another does the same.
The score is exact for one expert at a time on the layer's own inputs, and serves both routings.

Source: this project; docs/method.md derives it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.token_weights import PredictingWeights
from shape_moe.tracing.trace import Trace


@register("replacement", needs=("replacement",), weights=PredictingWeights())
def replacement(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """What the layer's output moves by when the router takes its next choice: ``sum_t |sum_B g' E - y|^2 / |h|^2``.

    Args:
        trace: a trace with the router's next choice.
        options: how much tokens count.

    Returns:
        float64 [L, E], without unit; 0 for experts that were never routed to.

    Raises:
        UsageError: when the trace does not hold it.
    """
    return trace.sums("replacement", options.weights)


@register("replacement-trained", needs=("replacement",), weights=PredictingWeights())
def replacement_trained(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """The same with gate weights that do not grow by what was removed; equal where routers renormalise.

    Args:
        trace: a trace with the router's next choice.
        options: how much tokens count.

    Returns:
        float64 [L, E], without unit; 0 for experts that were never routed to.

    Raises:
        UsageError: when the trace does not hold it.
    """
    name = "replacement_trained" if "replacement_trained" in trace.statistics else "replacement"
    return trace.sums(name, options.weights)
