"""Which keep rate is safe: the search over keep rates and ways to choose, and what is recommended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from shape_moe.errors import UsageError
from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.judge import Verdict
from shape_moe.evaluation.measures import Health
from shape_moe.selection.selection import ROUTINGS, Routing, Selection

KINDS = ("max_kl", "max_drop")
RESOLUTION = 0.01
"""Bisection stops when keep rates that fail and that pass are this close."""


@dataclass(frozen=True)
class Limit:
    """What a pruned model may lose at most, at the upper end of the 95 % interval.

    Attributes:
        kind: ``max_kl`` (mean KL divergence to the dense model, nats per token) or ``max_drop`` (fall of exact match,
            as a share: 0.01 is one percentage point).
        value: the limit.

    Raises:
        UsageError: for another kind, and a value outside (0, 1) (a KL may be larger).
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"A limit is one of {', '.join(KINDS)}, not {self.kind!r}.")
        if not (self.value > 0 and (self.value < 1 or self.kind == "max_kl")):
            sense = "above 0, such as 0.02" if self.kind == "max_kl" else "a share between 0 and 1, such as 1% or 0.01"
            raise UsageError(f"--{self.kind.replace('_', '-')} must be {sense}, not {self.value:g}.")

    def figure(self, verdict: Verdict) -> Estimate:
        """What the limit holds against a model, larger is worse.

        Raises:
            UsageError: for a fall of exact match where no example has a response.
        """
        if self.kind == "max_kl":
            return verdict.quality["kl"]
        if "exact_match" not in verdict.change:
            raise UsageError("--max-drop needs held-out examples with responses; use --max-kl for plain text.")
        gain = verdict.change["exact_match"]
        return Estimate(0.0 - gain.value, 0.0 - gain.high, 0.0 - gain.low)  # no minus before a zero

    def met(self, verdict: Verdict) -> bool:
        """Whether the upper end of the interval is within the limit."""
        return self.figure(verdict).high <= self.value

    def __str__(self) -> str:
        if self.kind == "max_kl":
            return f"a KL divergence of {self.value:g}"
        return f"a fall of exact match by {self.value:.1%}"


@dataclass(frozen=True)
class Combination:
    """One way to choose experts at any keep rate."""

    scorer: str
    rule: str
    routing: Routing
    target: str = "ragged"

    def __str__(self) -> str:
        return f"{self.scorer}/{self.rule}, {self.routing}" + (", stock" if self.target == "stock" else "")

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Combination:
        """Out of an object with the attributes' names as keys, wherever else it has."""
        routing = next((known for known in ROUTINGS if known == found["routing"]), None)
        if routing is None:
            raise ValueError(f"there is no routing {found['routing']!r}")
        return cls(str(found["scorer"]), str(found["rule"]), routing, str(found.get("target") or "ragged"))


@dataclass(frozen=True)
class SweptPoint:
    """One selection of a sweep, as a document describes it.

    Attributes:
        combination: how it was chosen.
        keep_asked: the keep rate asked for.
        keep: the keep rate met.
        kept: how many experts are kept.
        size: bytes of the pruned weights, None where they are not known.
        verdict: figures over the held-out examples.
        meets: whether the limit is met, None without a limit.
        fits: whether it fits the memory asked for, None where none was.
    """

    combination: Combination
    keep_asked: float
    keep: float
    kept: int
    size: int | None
    verdict: Verdict
    meets: bool | None = None
    fits: bool | None = None

    @property
    def healthy(self) -> bool | None:
        """Whether its free-running answers are like the dense model's; None where it was not generated from."""
        return None if self.verdict.health is None else not self.verdict.health.complaints

    @property
    def good(self) -> bool:
        """Whether nothing speaks against it."""
        return False not in {self.meets, self.healthy, self.fits}

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self.combination),
            "keep_asked": self.keep_asked,
            "keep": self.keep,
            "kept": self.kept,
            "bytes": self.size,
            **self.verdict.to_document(),
            "meets_limit": self.meets,
            "healthy": self.healthy,
            "fits": self.fits,
        }

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> SweptPoint:
        """What :meth:`to_document` described."""
        keep, size = float(found["keep"]), found.get("bytes")
        meets, fits = (None if found.get(key) is None else bool(found[key]) for key in ("meets_limit", "fits"))
        return cls(
            Combination.from_document(found),
            float(found.get("keep_asked", keep)),
            keep,
            int(found["kept"]),
            None if size is None else int(size),
            Verdict.from_document(found),
            meets,
            fits,
        )


@dataclass(frozen=True)
class SweepPoint:
    """One selection, judged.

    Attributes:
        combination: how it was chosen.
        selection: the experts.
        size: bytes of the pruned weights.
        verdict: figures over the held-out examples.
        meets: whether the limit is met, None without a limit.
        fits: whether it fits the memory asked for, None where none was.
    """

    combination: Combination
    selection: Selection
    size: int
    verdict: Verdict
    meets: bool | None = None
    fits: bool | None = None

    def with_health(self, health: Health | None) -> SweepPoint:
        """The same point with its free-running answers judged."""
        return replace(self, verdict=replace(self.verdict, health=health))

    @property
    def described(self) -> SweptPoint:
        """The point without its experts."""
        kept = self.selection
        return SweptPoint(
            *(self.combination, kept.keep_asked, kept.keep, kept.kept, self.size, self.verdict, self.meets, self.fits)
        )

    @property
    def healthy(self) -> bool | None:
        """Whether its free-running answers are like the dense model's; None where it was not generated from."""
        return self.described.healthy


Measure = Callable[[Combination, float], SweepPoint | None]
"""Judges a combination at a keep rate; None where no selection meets it."""


def grid(combinations: Iterable[Combination], keep_rates: Sequence[float], measure: Measure) -> list[SweepPoint]:
    """Judge every combination at every keep rate, the largest rates first."""
    rates = sorted(keep_rates, reverse=True)
    found = [measure(combination, keep) for combination in combinations for keep in rates]
    return [point for point in found if point is not None]


def bisect(combination: Combination, measure: Measure, limit: Limit, *, most: float = 1.0) -> list[SweepPoint]:
    """Look for the smallest keep rate that meets a limit, as if meeting it were a matter of keeping enough.

    Args:
        combination: how to choose.
        measure: judges a keep rate.
        limit: the limit.
        most: the largest keep rate to consider.

    Returns:
        The points judged, in the order in which they were.
    """
    fails, passes, points = 0.0, most, []
    while passes - fails > RESOLUTION:
        middle = (fails + passes) / 2
        point = measure(combination, middle)
        if point is not None:
            points.append(point)
        if point is not None and limit.met(point.verdict):
            passes = middle
        else:
            fails = middle
    return points


def bisection_steps(most: float = 1.0) -> int:
    """How many keep rates :func:`bisect` judges."""
    return max(0, math.ceil(math.log2(most / RESOLUTION)))


@dataclass(frozen=True)
class Recommendation:
    """What a sweep advises.

    Attributes:
        points: all points, those generated from with their answers judged.
        smallest: index of the smallest point within the limit, healthy or not.
        chosen: index of the operating point: the smallest one within the limit whose answers are healthy.
        reason: why, in a sentence.
    """

    points: list[SweepPoint]
    smallest: int | None
    chosen: int | None
    reason: str


def recommend(
    points: Sequence[SweepPoint], limit: Limit, generate: Callable[[SweepPoint], Health | None]
) -> Recommendation:
    """Find the operating point; every candidate is generated from before it is recommended.

    Candidates are the points within the limit (and the memory, where one was given), smallest first, those of one
    size by their figure.

    Args:
        points: the points, judged.
        limit: what may be lost.
        generate: lets a point answer freely; None where there is nothing to answer (plain text).
    """
    judged = list(points)
    within = [i for i, point in enumerate(judged) if point.meets and point.fits is not False]
    within.sort(key=lambda i: (judged[i].selection.kept, limit.figure(judged[i].verdict).value, i))
    if not within:
        fitting = " of those that fit" if any(point.fits is False for point in judged) else ""
        return Recommendation(judged, None, None, f"No point{fitting} stays within {limit}.")
    passed_over = 0
    for i in within:
        health = generate(judged[i])
        judged[i] = judged[i].with_health(health)
        if health is None or not health.complaints:
            return Recommendation(judged, within[0], i, _reason(judged[i], limit, passed_over))
        passed_over += 1
    return Recommendation(
        judged, within[0], None, f"{passed_over} points stay within {limit}, but none of them answers like the dense."
    )


def _reason(point: SweepPoint, limit: Limit, passed_over: int) -> str:
    figure = limit.figure(point.verdict)
    shown = f"{figure.value:.4f} (at most {figure.high:.4f})"
    if limit.kind == "max_drop":
        shown = f"{figure.value:.1%} (at most {figure.high:.1%})"
    reason = f"Keep {point.selection.keep:.3f} by {point.combination} is the smallest within {limit}: {shown}"
    if passed_over:
        reason += f"; {passed_over} smaller within the limit, but with unhealthy answers"
    return reason + "."
