"""Estimates with 95 % intervals: a paired bootstrap over examples, widened where it cannot see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import ceil, copysign, inf, isnan, nan, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000
_TAIL = 0.025
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval; NaN where they are not known."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):  # NumPy's numbers, however they came about, are shown as plain ones
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def has_interval(self) -> bool:
        """Whether the ends are known (not NaN)."""
        return not (isnan(self.low) or isnan(self.high))

    def to_document(self) -> dict[str, float | None]:
        """The three numbers by name; None for an end that is not known."""
        return {name: None if isnan(number) else number for name, number in asdict(self).items()}

    @classmethod
    def from_document(cls, document: Mapping[str, float | None]) -> Estimate:
        """The estimate that :meth:`to_document` described."""
        ends = (document[name] for name in ("value", "low", "high"))
        return cls(*(nan if end is None else float(end) for end in ends))

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the figure."""
        return Estimate(function(self.value), function(self.low), function(self.high))


class Bootstrap:
    """Resamples of a set of examples; the same resamples serve every figure, which pairs all of them.

    Args:
        examples: how many examples.
        seed: draws the resamples.
        comparisons: how many candidates the best is picked from: intervals then hold for all of them together
            (Bonferroni), without which the luckiest one looks better than it is.
    """

    def __init__(self, examples: int, seed: int = 0, comparisons: int = 1) -> None:
        self.examples, self.seed, self.comparisons = examples, seed, comparisons
        self._tail = _TAIL / comparisons
        self._z = quantile(comparisons)
        rng = np.random.default_rng(seed)
        self.weights = rng.multinomial(examples, np.full(examples, 1 / examples), size=RESAMPLES).astype(np.float64)

    def of(self, examples: int) -> Bootstrap:
        """Resamples of fewer examples, alike in all else."""
        return self if examples == self.examples else Bootstrap(examples, self.seed, self.comparisons)

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
        """``sum(numerators) / sum(denominators)``; resamples whose denominator is zero are left out.

        Differences of two models over the same tokens are ratios as well: give the differences as numerators.
        """
        above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
        drawn_below = self.weights @ below
        drawn = (self.weights @ above)[drawn_below > 0] / drawn_below[drawn_below > 0]
        low, high = np.quantile(drawn, (self._tail, 1 - self._tail)) if drawn.size else (np.nan, np.nan)
        return Estimate(float(above.sum() / below.sum()), float(low), float(high))

    def share(self, hits: ArrayLike) -> Estimate:
        """Share of examples with a property.

        The bootstrap of a share near 0 or 1 is too narrow (of no hits it makes certainty), so that the interval is
        the wider one of the bootstrap's and Wilson's.
        """
        found = np.asarray(hits, dtype=np.float64)
        estimate = self.ratio(found, np.ones(found.shape))
        return _wider(estimate, *wilson_interval(float(found.mean()), found.size, self._z))

    def share_difference(self, hits: ArrayLike, baseline: ArrayLike) -> Estimate:
        """Difference of two shares over the same examples.

        The wider interval of the paired bootstrap's and the score interval (:func:`score_interval`): where two models
        agree on every example seen, they may still differ on the next.
        """
        ours, theirs = np.asarray(hits, dtype=bool), np.asarray(baseline, dtype=bool)
        estimate = self.ratio(ours.astype(np.float64) - theirs, np.ones(ours.shape))
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return _wider(estimate, *score_interval(gained, lost, ours.size, self._z))


def quantile(comparisons: int = 1) -> float:
    """How many standard deviations a 95 % interval reaches to hold for so many comparisons together."""
    return NormalDist().inv_cdf(1 - _TAIL / comparisons)


def wilson_interval(share: float, count: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a share that was seen in ``count`` draws."""
    centre = (share * count + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * sqrt(share * (1 - share) * count + z**2 / 4)
    return centre - half, centre + half


def least_fall(examples: int, comparisons: int = 1) -> float:
    """The upper end of a fall's interval where two models agree on all of so many examples: ``z^2 / (n + z^2)``."""
    z = quantile(comparisons)
    return z**2 / (examples + z**2)


def examples_for(fall: float, comparisons: int = 1) -> int:
    """How many examples :func:`least_fall` needs to be at most ``fall``."""
    return ceil(quantile(comparisons) ** 2 * (1 - fall) / fall)


def score_interval(gained: int, lost: int, count: int, z: float) -> tuple[float, float]:
    """The score interval of a difference of paired shares (Tango 1998).

    It holds every difference ``d`` whose score statistic ``(gained - lost - n d) / sqrt(n (2 q + d (1 - d)))`` lies
    within ``[-z, z]``; ``q`` is the likeliest share of losses for that ``d``, the positive root of ``2 n q^2 +
    ((2 n - gained + lost) d - gained - lost) q - lost d (1 - d)``. Where nothing is lost, the upper end is that of
    Wilson's interval of ``gained``.

    Args:
        gained: examples that only the first model has.
        lost: examples that only the second model has.
        count: all examples.
        z: quantile of the normal distribution.

    Returns:
        The ends, within [-1, 1].
    """

    def statistic(difference: float) -> float:
        slope = (2 * count - gained + lost) * difference - gained - lost
        root = sqrt(max(0.0, slope**2 + 8 * count * lost * difference * (1 - difference)))
        q = (root - slope) / (4 * count)
        variance = count * (2 * q + difference * (1 - difference))
        above = gained - lost - count * difference
        return above / sqrt(variance) if variance > 0 else copysign(inf, above) if above else 0.0

    middle = (gained - lost) / count
    return _root(statistic, z, -1.0, middle), _root(statistic, -z, middle, 1.0)


def _root(falling: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling function reaches a level, by bisection to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if falling(middle) > level else (low, middle)
    return (low + high) / 2


def _wider(estimate: Estimate, low: float, high: float) -> Estimate:
    return Estimate(estimate.value, min(estimate.low, low), max(estimate.high, high))
