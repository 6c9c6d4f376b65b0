"""What ``auto`` tries and takes: the method that loses least, or the smallest keep rate within a limit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.comparison import Comparison
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import DEFAULT_LIMIT, Limit, Point, grid
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.planning import SearchPlan
from shape_moe.jobs.search import Search, open_bench
from shape_moe.jobs.select import AUTO
from shape_moe.progress import Progress
from shape_moe.scoring.registry import get_scorer
from shape_moe.selection.method import ROUTINGS, Method, Routing
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.selection.selection import Selection
from shape_moe.tracing.engine import every_statistic
from shape_moe.tracing.trace import Trace
from shape_moe.units import readable_kl

AUTO_METHODS = (
    ("easy-ep", "uniform"),
    ("contribution", "uniform"),
    ("easy-ep", "coverage"),
    ("contribution", "coverage"),
    ("contribution", "global"),
    ("reap", "uniform"),
    ("shape", "coverage"),
    ("shape", "uniform"),
)
"""What ``auto`` tries with each routing, best of the benchmark first; ties within noise go to the earlier one."""

AUTO_HELD_OUT = 64
"""Examples that candidates are judged by when nothing else is said."""
_NAMED = 3


@dataclass(frozen=True)
class ChoiceOptions:
    """What is left to the tool.

    Attributes:
        limit: what may be lost; the keep rate is then the smallest that stays within. None keeps the rate asked for.
        rules: rules to try with scorer ``auto``, None for those that the benchmark found good.
        routings: routings to try, None for both with scorer ``auto`` and for the one asked for otherwise.
        held_out: examples to judge by, None for a share of the calibration data.
        held_out_samples: how many, None for 64, with a limit 400.
        generation: how candidates answer freely before one is chosen.
    """

    limit: Limit | None = None
    rules: tuple[str, ...] | None = None
    routings: tuple[Routing, ...] | None = None
    held_out: DataOptions | None = None
    held_out_samples: int | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    @property
    def samples(self) -> int:
        """How many examples to judge by."""
        if self.held_out_samples is not None:
            return self.held_out_samples
        return HELD_OUT_SAMPLES if self.limit else AUTO_HELD_OUT


def auto_select(
    snapshot: Snapshot,
    plan: SearchPlan,
    trace: Trace,
    asked: SelectOptions,
    options: ChoiceOptions,
    progress: Progress,
    folder: Path | None = None,
) -> Selection:
    """Select by judging what several methods, or one at several keep rates, select, as masks on held-out examples.

    Args:
        snapshot: the model on disk.
        plan: the session and the held-out records.
        trace: the calibration trace.
        asked: what was asked for; its scorer may be :data:`shape_moe.jobs.select.AUTO`, and a limit overrules its
            keep rate.
        options: what is left to choose.
        progress: where to show progress.
        folder: where answers and judged selections are kept for a later run.

    Returns:
        The selection, with what was tried in its ``choice``.

    Raises:
        ShapeMoeError: when nothing stays within the limit.
    """

    def options_of(method: Method, keep: float) -> SelectOptions:
        rounding = asked.allow_rounding or method.equal_counts
        return replace(asked, keep=keep, method=method, tolerance=None, allow_rounding=rounding)

    methods = methods_to_try(asked.method, options, trace.info.top_k, trace.statistics)
    limit, scoring = options.limit or DEFAULT_LIMIT, asked.scoring
    with open_bench(plan, options.generation, limit, len(methods), scoring.seed, progress, folder) as bench:
        selector, size = TraceSelector(trace, scoring), measure(snapshot)
        search = Search(bench, selector, options_of, methods, limit, size, progress)
        selection, record = _closest(search, asked.keep) if options.limit is None else _smallest(search)
        record |= {"examples": len(bench.held_out.examples), "split": plan.sentence}
        return plan.told(replace(selection, choice=record))


def methods_to_try(
    asked: Method, options: ChoiceOptions, top_k: int, statistics: Collection[str] | None = None
) -> list[Method]:
    """The methods that are tried, preferred ones first.

    Args:
        asked: what was asked for.
        options: what is left to choose.
        top_k: experts per token of the model.
        statistics: what the trace holds beside coalitions, None for all that are installed.
    """
    automatic = asked.scorer == AUTO
    routings = options.routings or (ROUTINGS if automatic and not asked.equal_counts else (asked.routing,))
    pairs: Sequence[tuple[str, str]] = [(asked.scorer, asked.rule)]
    if automatic:
        held = {"coalitions", *(every_statistic() if statistics is None else statistics)}
        known = ((pair, get_scorer(pair[0])) for pair in AUTO_METHODS)
        pairs = [pair for pair, scorer in known if set(scorer.needs) <= held and scorer.can_value(top_k)]
        if options.rules is not None:
            named = dict.fromkeys(scorer for scorer, _ in pairs)
            pairs = [(scorer, rule) for scorer in named for rule in options.rules]
        elif asked.equal_counts:  # they leave nothing to share out
            pairs = [pair for pair in pairs if pair[1] == "uniform"]
        pairs = pairs or [("frequency", "uniform")]
    return [
        replace(
            asked,
            scorer=s,
            rule=r,
            routing=routing,
            gate_scale=asked.gate_scale if routing == "reroute" else "survivors",
        )
        for s, r in pairs
        for routing in routings
    ]


def _smallest(search: Search) -> tuple[Selection, dict[str, Any]]:
    """The smallest selection within the limit, and what was tried."""
    advice = search.recommend(None)
    if advice.point is None:
        raise ShapeMoeError(
            f"{advice.reason} Nothing was pruned; allow more, or give a keep rate and see "
            "`shape-moe sweep` for what it costs."
        )
    return advice.point.selection, {
        "how": "the smallest keep rate within the limit",
        "limit": asdict(search.limit),
        "tried": [_entry(point) for point in advice.points],
        "reason": advice.reason,
    }


def _closest(search: Search, keep: float) -> tuple[Selection, dict[str, Any]]:
    """The selection closest to the dense model at one keep rate, and what was tried.

    Ties within noise go to the preferred one.
    """
    with search.measuring("Trying scorers, rules and routings", len(search.methods), "candidate") as measure:
        points = grid(search.methods, [keep], measure)
    if not points:
        raise UsageError(f"No candidate can keep {keep:g} of the experts under the constraints; try a larger rate.")
    best = min(range(len(points)), key=lambda i: (_kl(points[i]), i))
    tied = tied_with(best, points, search.bench)
    selection = points[tied[0]].selection
    health = search.bench.judge(selection).health
    warnings = tuple(f"On held-out examples, {complaint}." for complaint in health.complaints) if health else ()
    return replace(selection, warnings=selection.warnings + warnings), {
        "how": "the candidate closest to the dense model on held-out examples",
        "tried": [_entry(point) for point in points],
        "best": str(points[best].method),
        "tied": [str(points[i].method) for i in tied],
        "reason": _reason(points, best, tied),
    }


def tied_with(best: int, points: Sequence[Point], bench: Comparison) -> list[int]:
    """Which points are the best one, or as good but for noise, in their order."""
    return [i for i, point in enumerate(points) if i == best or bench.tied(point.selection, points[best].selection)]


def _kl(point: Point) -> float:
    return point.measured.quality["kl"].value


def _entry(point: Point) -> dict[str, Any]:
    """What is told of a point that was tried."""
    change = point.measured.change.get("exact_match")
    return {
        "method": str(point.method),
        "keep": point.selection.keep,
        "kl": point.measured.quality["kl"].to_document(),
        "exact_match_change": change.to_document() if change is not None else None,
    }


def _reason(points: list[Point], best: int, tied: list[int]) -> str:
    chosen, point = tied[0], points[tied[0]]
    reason = f"{point.method} with a KL divergence of {readable_kl(_kl(point))} on held-out examples"
    if len(tied) > 1:
        others = [str(points[i].method) for i in tied if i != chosen]
        reason += f"; within noise of it: {', '.join(others[:_NAMED])}"
        reason += f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        if chosen != best:
            reason += f" (best by its figure: {points[best].method}, {readable_kl(_kl(points[best]))}; ties go to the "
            reason += "benchmark's preference)"
    beaten = [i for i in range(len(points)) if i not in tied]
    if beaten:
        nearest = min(beaten, key=lambda i: _kl(points[i]))
        figure = readable_kl(_kl(points[nearest]))
        reason += f"; clearly behind, nearest first: {points[nearest].method}"
        reason += f" with {figure}" if figure != readable_kl(_kl(point)) else ""
    return reason + "."
