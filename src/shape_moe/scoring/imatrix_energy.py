"""Output energy estimated from an imatrix of llama.cpp, for who has no trace.

Source: this project; :mod:`shape_moe.interop.imatrix_trace` has the formula and what it leaves out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace


@register("imatrix-energy", needs=("imatrix_energy",), converted=True)
def imatrix_energy(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Energy of outputs, estimated from an imatrix: ``sum_t |E_i|^2 ~ sum_c |D_c|^2 sum_t u_c^2``.

    Args:
        trace: one that was converted from an imatrix.
        options: how much tokens count; an imatrix does not tell them apart.

    Returns:
        float64 [L, E], in units of squared hidden states.

    Raises:
        UsageError: when the trace holds no such energies.
    """
    return trace.sums("imatrix_energy", options.weights)
