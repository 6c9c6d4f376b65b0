"""Which keep rate is safe: the search over keep rates and methods, and what is recommended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from shape_moe.errors import UsageError
from shape_moe.evaluation.intervals import Estimate, examples_for, least_fall
from shape_moe.evaluation.measures import Health, Measured
from shape_moe.selection.method import Method
from shape_moe.selection.selection import Selection
from shape_moe.units import kl_at_most, readable_kl, readable_share, share_at_most

KINDS = ("max_kl", "max_drop")
KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25)
"""What is judged where neither keep rates nor a limit are given."""
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

    def figure(self, measured: Measured) -> Estimate:
        """What the limit holds against a model, larger is worse.

        Raises:
            UsageError: for a fall of exact match where no example has a response.
        """
        if self.kind == "max_kl":
            return measured.quality["kl"]
        if "exact_match" not in measured.change:
            raise UsageError("--max-drop needs held-out examples with responses; use --max-kl for plain text.")
        gain = measured.change["exact_match"]
        return Estimate(0.0 - gain.value, 0.0 - gain.high, 0.0 - gain.low)  # no minus before a zero

    def met(self, measured: Measured) -> bool:
        """Whether the upper end of the interval is within the limit."""
        return self.figure(measured).high <= self.value

    def check_examples(self, count: int, comparisons: int) -> None:
        """Refuse a limit that no model could be shown to meet, because there are too few held-out examples.

        Args:
            count: held-out examples.
            comparisons: how many methods the best is picked from.

        Raises:
            UsageError: with the number that would do.
        """
        if self.kind != "max_drop" or least_fall(count, comparisons) <= self.value:
            return
        together = f" for {comparisons} methods together" if comparisons > 1 else ""
        least = share_at_most(least_fall(count, comparisons))
        raise UsageError(
            f"{count} held-out examples cannot show a fall of exact match below {least}"
            f"{together}, even if no answer changes: judge by {examples_for(self.value, comparisons):,} or more "
            "(--held-out-samples), allow a larger fall, or use --max-kl."
        )

    def check_dense(self, dense: Measured) -> None:
        """Refuse a limit on exact match where the dense model itself has little to lose.

        Raises:
            UsageError: where it gives the exact response to less than half of the examples.
        """
        right = dense.quality["exact_match"].value if "exact_match" in dense.quality else 0.0
        if self.kind == "max_drop" and right < _MOSTLY:
            raise UsageError(
                f"The dense model gives the exact response to only {readable_share(right)} of the held-out examples, "
                "so a fall of that share says little: name the part that must be right with --answer-pattern REGEX, or "
                "use --max-kl."
            )

    def __str__(self) -> str:
        if self.kind == "max_kl":
            return f"a KL divergence of {self.value:g}"
        return f"a fall of exact match by {readable_share(self.value)}"


DEFAULT_LIMIT = Limit("max_kl", 0.02)
"""What a recommendation keeps to when no limit is given."""
_MOSTLY = 0.5


@dataclass(frozen=True)
class SweptPoint:
    """One selection of a sweep, as a document describes it.

    Attributes:
        method: how it was chosen.
        keep_asked: the keep rate asked for.
        keep: the keep rate met.
        kept: how many experts are kept.
        size: bytes of the pruned weights, None where they are not known.
        measured: figures over the held-out examples.
        meets: whether the limit is met, None without a limit.
        fits: whether it fits the memory asked for, None where none was.
    """

    method: Method
    keep_asked: float
    keep: float
    kept: int
    size: int | None
    measured: Measured
    meets: bool | None = None
    fits: bool | None = None

    @property
    def healthy(self) -> bool | None:
        """Whether its free-running answers are like the dense model's; None where it was not generated from."""
        return None if self.measured.health is None else not self.measured.health.complaints

    @property
    def good(self) -> bool:
        """Whether nothing speaks against it."""
        return False not in {self.meets, self.healthy, self.fits}

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self.method),
            "keep_asked": self.keep_asked,
            "keep": self.keep,
            "kept": self.kept,
            "bytes": self.size,
            **self.measured.to_document(),
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
            Method.from_document(found),
            float(found.get("keep_asked", keep)),
            keep,
            int(found["kept"]),
            None if size is None else int(size),
            Measured.from_document(found),
            meets,
            fits,
        )


@dataclass(frozen=True)
class Point:
    """One selection, judged.

    Attributes:
        method: how it was chosen.
        selection: the experts.
        size: bytes of the pruned weights.
        measured: figures over the held-out examples.
        meets: whether the limit is met, None without a limit.
        fits: whether it fits the memory asked for, None where none was.
    """

    method: Method
    selection: Selection
    size: int
    measured: Measured
    meets: bool | None = None
    fits: bool | None = None

    @property
    def described(self) -> SweptPoint:
        """The point without its experts."""
        kept = self.selection
        return SweptPoint(
            *(self.method, kept.keep_asked, kept.keep, kept.kept, self.size, self.measured, self.meets, self.fits)
        )

    @property
    def healthy(self) -> bool | None:
        """Whether its free-running answers are like the dense model's; None where it was not generated from."""
        return self.described.healthy

    def with_health(self, health: Health | None) -> Point:
        """The same point with its free-running answers judged."""
        return replace(self, measured=replace(self.measured, health=health))


Measure = Callable[[Sequence[tuple[Method, float]]], list[Point | None]]
"""Judges methods at keep rates, all that are asked for at once; None where no selection meets one."""


def grid(methods: Iterable[Method], keep_rates: Sequence[float], measure: Measure) -> list[Point]:
    """Judge every method at every keep rate, the largest rates first."""
    rates = sorted(keep_rates, reverse=True)
    found = measure([(method, keep) for method in methods for keep in rates])
    return [point for point in found if point is not None]


def bisect_keep_rates(
    methods: Sequence[Method], measure: Measure, limit: Limit, *, most: float = 1.0, at_once: int = 1
) -> list[Point]:
    """Look for the smallest keep rate that meets a limit, as if meeting it were a matter of keeping enough.

    All methods are judged together, each between the largest rate that fails and the smallest that passes: with one
    rate at once this is bisection.

    Args:
        methods: how to choose.
        measure: judges keep rates.
        limit: the limit.
        most: the largest keep rate to consider.
        at_once: how many rates of each method are judged at once.

    Returns:
        The points judged, by method, in the order in which they were.
    """
    bounds = [(0.0, most)] * len(methods)
    points: list[list[Point]] = [[] for _ in methods]
    for _ in range(rounds_of(most, at_once)):
        rates = [[low + (high - low) * i / (at_once + 1) for i in range(1, at_once + 1)] for low, high in bounds]
        asked = [(method, rate) for method, of in zip(methods, rates, strict=True) for rate in of]
        found = measure(asked)
        for number, of in enumerate(rates):
            judged = found[number * at_once : (number + 1) * at_once]
            points[number] += [point for point in judged if point is not None]
            low, high = bounds[number]
            met = [point is not None and limit.met(point.measured) for point in judged]
            high = min([high, *(rate for rate, meets in zip(of, met, strict=True) if meets)])
            low = max([low, *(rate for rate, meets in zip(of, met, strict=True) if not meets and rate < high)])
            bounds[number] = low, high
    return [point for of in points for point in of]


def rounds_of(most: float = 1.0, at_once: int = 1) -> int:
    """How often :func:`bisect_keep_rates` judges, until rates that fail and that pass are :data:`RESOLUTION` apart."""
    rounds, width = 0, most
    while width > RESOLUTION:
        rounds, width = rounds + 1, width / (at_once + 1)
    return rounds


def measure_points(
    methods: Sequence[Method],
    keep_rates: Sequence[float] | None,
    measure: Measure,
    limit: Limit,
    *,
    most: float = 1.0,
    at_once: int = 1,
) -> list[Point]:
    """Judge every method at given keep rates, or where these are None, at those of :func:`bisect_keep_rates`."""
    if keep_rates is not None:
        return grid(methods, keep_rates, measure)
    return bisect_keep_rates(methods, measure, limit, most=most, at_once=at_once)


def steps_of(keep_rates: Sequence[float] | None, most: float = 1.0, at_once: int = 1) -> int:
    """How many keep rates :func:`measure_points` judges each method at."""
    return len(keep_rates) if keep_rates is not None else at_once * rounds_of(most, at_once)


@dataclass(frozen=True)
class Recommendation:
    """What a sweep advises.

    Attributes:
        points: all points, those generated from with their answers judged.
        smallest: index of the smallest point within the limit, healthy or not.
        chosen: index of the operating point: the smallest one within the limit whose answers are healthy.
        reason: why, in a sentence.
    """

    points: list[Point]
    smallest: int | None
    chosen: int | None
    reason: str

    @property
    def point(self) -> Point | None:
        """The operating point, None where there is none."""
        return None if self.chosen is None else self.points[self.chosen]


def recommend(points: Sequence[Point], limit: Limit, generate: Callable[[Point], Health | None]) -> Recommendation:
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
    within.sort(key=lambda i: (judged[i].selection.kept, limit.figure(judged[i].measured).value, i))
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


def _reason(point: Point, limit: Limit, passed_over: int) -> str:
    figure = limit.figure(point.measured)
    shown = f"{readable_kl(figure.value)} (at most {kl_at_most(figure.high)})"
    if limit.kind == "max_drop":
        shown = f"{readable_share(figure.value)} (at most {share_at_most(figure.high)})"
    reason = f"Keep {readable_share(point.selection.keep)} by {point.method} is the smallest within {limit}: {shown}"
    if passed_over:
        reason += f"; {passed_over} smaller within the limit, but with unhealthy answers"
    return reason + "."
