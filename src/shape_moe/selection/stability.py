"""How far a selection depends on which examples were drawn: the two halves of the data, compared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stability(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, float]:
    """Compare the selections that each half of the examples gives at the same budget.

    Args:
        first: bool [L, E], kept from the even folds alone.
        second: bool [L, E], kept from the odd folds alone; as many as in ``first``.

    Returns:
        ``agreement``: share of the kept places that both halves fill alike; ``undecided``: places that they fill
        with different experts.
    """
    kept = int(first.sum())
    shared = int((first & second).sum())
    return {"agreement": shared / kept, "undecided": float(kept - shared)}
