"""A scorer: what experts give, less what they take back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace


@register("unopposed", needs=("gated_norm", "opposed"))
def unopposed(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Gated output norms over one plus what was opposed: ``sum_t g |E_i| / (1 + sum_t g max(0, -<E_i, h + y>))``.

    Args:
        trace: a trace that was made with this package installed.
        options: factors on prompt and response tokens.

    Returns:
        float64 [L, E]; larger is more valuable.
    """
    return trace.sums("gated_norm", options.weights) / (1 + trace.sums("opposed", options.weights))
