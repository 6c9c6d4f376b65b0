"""What a selection loses by its worst class: the figure that candidates are compared by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shape_moe.evaluation.intervals import Bootstrap, Estimate

Values = NDArray[np.float64]


class WorstClass:
    """Compares candidates by ``max_c (sum of losses of class c) / (its tokens)``, over resamples of the examples.

    Args:
        groups: class of every example; None is a class of its own.
        tokens: scored tokens of every example [n].
        draws: resamples of the examples.

    Attributes:
        names: the classes that have tokens.
    """

    def __init__(self, groups: Sequence[str | None], tokens: ArrayLike, draws: Bootstrap) -> None:
        below = np.asarray(tokens, dtype=np.float64)
        every = np.array([group or "" for group in groups])
        names = [name for name in sorted(set(every)) if below[every == name].sum() > 0]
        self.names = tuple(str(name) for name in names)
        self._draws = draws
        self._members = [np.flatnonzero(every == name) for name in names]
        self._tokens = [below[rows] for rows in self._members]

    def losses(self, sums: ArrayLike) -> dict[str, float]:
        """Mean loss per token of every class.

        Args:
            sums: sums of a loss over the tokens of every example [n].
        """
        found = np.asarray(sums, dtype=np.float64)
        pairs = zip(self.names, self._members, self._tokens, strict=True)
        return {name: float(found[rows].sum() / tokens.sum()) for name, rows, tokens in pairs}

    def worst(self, sums: ArrayLike) -> float:
        """The largest of :meth:`losses`."""
        return max(self.losses(sums).values())

    def behind(self, ours: ArrayLike, theirs: ArrayLike) -> Estimate:
        """How much more one candidate loses by its worst class than another does by its own, paired.

        Every resample finds the worst class of both anew; those without tokens are left out. The interval is that of
        one comparison: it tells noise from a difference, and certifies nothing.
        """
        mine, others = self._drawn(ours), self._drawn(theirs)
        has_tokens = np.isfinite(mine)
        difference = mine[has_tokens] - others[has_tokens]
        low, high = np.quantile(difference, (0.025, 0.975))
        return Estimate(self.worst(ours) - self.worst(theirs), float(low), float(high))

    def _drawn(self, sums: ArrayLike) -> Values:
        found = np.asarray(sums, dtype=np.float64)
        largest = np.full(len(self._draws.weights), -np.inf)
        for rows, tokens in zip(self._members, self._tokens, strict=True):
            weights = self._draws.weights[:, rows]
            below = weights @ tokens
            mean = np.divide(weights @ found[rows], below, out=np.full(len(below), -np.inf), where=below > 0)
            largest = np.maximum(largest, mean)
        return largest
