"""Baseline: random values, drawn from a seed that depends on nothing but the seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace


def random_values(layers: int, experts: int, seed: int) -> NDArray[np.float64]:
    """Independent uniform values in [0, 1), float64 [layers, experts]; the same on every machine."""
    return np.random.default_rng(seed).uniform(size=(layers, experts))


@register("random", needs=())
def random(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """Uniform random values from a seed: what a selection is worth without any knowledge.

    Args:
        trace: only its shape is used.
        options: its seed is used.

    Returns:
        float64 [L, E].
    """
    return random_values(len(trace.info.layers), trace.info.num_experts, options.seed)
