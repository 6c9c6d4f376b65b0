"""Scores of several classes of examples as one: no class is paid for with another.

Added up, a class with more tokens (or larger values) outweighs the others, and experts that only a small class needs
are lost. So every class is scored by itself, its scores are made shares, and an expert is worth what it is worth to the
class that needs it most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def joined(classes: Sequence[NDArray[np.float64]], *, by_layer: bool) -> NDArray[np.float64]:
    """The largest share that an expert has in any class: ``max_c s_c[l, i] / S_c``.

    ``S_c`` is the class's sum of positive scores, in each layer (``by_layer``) or over all layers; where nothing is
    positive, the sum of sizes. A class's scale does not matter, nor the order of classes, nor whether one comes twice.

    Args:
        classes: float64 [L, E] of every class, one at least.
        by_layer: whether scores become shares of their layer, or of the whole model.

    Returns:
        float64 [L, E]; what is 0 in all classes is 0.
    """
    axis = 1 if by_layer else None
    return np.asarray(np.maximum.reduce([_shares(values, axis) for values in classes]))


def _shares(values: NDArray[np.float64], axis: int | None) -> NDArray[np.float64]:
    mass = np.maximum(values, 0).sum(axis=axis, keepdims=True)
    size = np.abs(values).sum(axis=axis, keepdims=True)
    whole = np.where(mass > 0, mass, size)
    return np.asarray(np.divide(values, whole, out=np.zeros_like(values), where=whole > 0))
