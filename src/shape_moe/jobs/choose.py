"""Choose for the user: the scorer and rule that lose least, or the smallest keep rate within a limit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import Combination, Limit, SweepPoint, grid
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.planning import Plan
from shape_moe.jobs.search import Search, SweepOptions
from shape_moe.jobs.select import AUTO, SelectionJob
from shape_moe.progress import Progress
from shape_moe.scoring.registry import get_scorer
from shape_moe.selection.selection import Routing, Selection
from shape_moe.tracing.statistics import STATISTICS
from shape_moe.tracing.trace import Trace

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


def choose(
    snapshot: Snapshot,
    plan: Plan,
    trace: Trace,
    job: SelectionJob,
    options: ChoiceOptions,
    progress: Progress,
    folder: Path | None = None,
) -> Selection:
    """Choose a selection by judging candidates on held-out examples as masks.

    Args:
        snapshot: the model on disk.
        plan: the session and the held-out records.
        trace: the calibration trace.
        job: what was asked for; its scorer may be :data:`AUTO`, and its keep rate is not looked at with a limit.
        options: what is left to choose.
        progress: where to show progress.
        folder: where answers and finished candidates are kept for a later run.

    Returns:
        The selection, with what was tried in its ``choice``.

    Raises:
        ShapeMoeError: when nothing stays within the limit.
    """
    combinations = candidates(job, options, trace.info.top_k, trace.statistics)
    sweep = SweepOptions(
        limit=options.limit,
        scoring=job.scoring,
        generation=options.generation,
        constraints=job.options,
    )
    search = Search(snapshot, plan, trace, sweep, combinations, progress, folder)
    try:
        if options.limit is not None:
            return _smallest(search)
        return _best(search, job.options.keep)
    finally:
        search.judge.close()


def candidates(
    job: SelectionJob, options: ChoiceOptions, top_k: int, statistics: Collection[str] = STATISTICS.keys()
) -> list[Combination]:
    """The ways to choose that are tried, preferred ones first.

    Args:
        job: what was asked for.
        options: what is left to choose.
        top_k: experts per token of the model.
        statistics: what the trace holds beside coalitions.
    """
    target = job.options.target
    asked: tuple[Routing, ...] = (job.options.routing,)
    both: tuple[Routing, ...] = ("drop", "reroute")
    automatic = job.scorer == AUTO
    routings = options.routings or (both if automatic and target == "ragged" else asked)
    methods: Sequence[tuple[str, str]] = [(job.scorer, job.options.rule)]
    if automatic:
        held = {"coalitions", *statistics}
        methods = [(scorer, rule) for scorer, rule in AUTO_METHODS if set(get_scorer(scorer).needs) <= held]
        methods = [method for method in methods if get_scorer(method[0]).can_value(top_k)]
        if options.rules is not None:
            named = dict.fromkeys(scorer for scorer, _ in methods)
            methods = [(scorer, rule) for scorer in named for rule in options.rules]
        elif target == "stock":  # equal counts leave nothing to share out
            methods = [(scorer, rule) for scorer, rule in methods if rule == "uniform"]
        methods = methods or [("frequency", "uniform")]
    return [Combination(scorer, rule, routing, target) for scorer, rule in methods for routing in routings]


def _smallest(search: Search) -> Selection:
    found = search.run()
    if found.chosen is None:
        raise ShapeMoeError(
            f"{found.recommendation.reason} Nothing was pruned; allow more, or give a keep rate and see "
            "`shape-moe sweep` for what it costs."
        )
    points = [_tried(point) for point in found.recommendation.points]
    record = {
        "how": "the smallest keep rate within the limit",
        "limit": found.document["limit"],
        "tried": points,
        "reason": found.recommendation.reason,
        "examples": len(search.judge.held_out.examples),
        "split": search.plan.sentence,
    }
    return replace(found.chosen.selection, choice=record)


def _best(search: Search, keep: float) -> Selection:
    """The candidate closest to the dense model at one keep rate; ties within noise go to the preferred one."""
    title = "Trying scorers, rules and routings"
    with search.measuring(title, len(search.combinations), "candidate") as measure:
        points = grid(search.combinations, [keep], measure)
    if not points:
        raise UsageError(f"No candidate can keep {keep:g} of the experts under the constraints; try a larger rate.")
    best = min(range(len(points)), key=lambda i: (_kl(points[i]), i))
    tied = [i for i in range(len(points)) if _tied(search, points[i], points[best])]
    chosen = tied[0]
    record = {
        "how": "the candidate closest to the dense model on held-out examples",
        "tried": [_tried(point) for point in points],
        "best": str(points[best].combination),
        "tied": [str(points[i].combination) for i in tied],
        "reason": _reason(points, chosen, best, tied),
        "examples": len(search.judge.held_out.examples),
        "split": search.plan.sentence,
    }
    selection = points[chosen].selection
    health = search.health(points[chosen])
    warnings = tuple(f"On held-out examples, {complaint}." for complaint in health.complaints) if health else ()
    return replace(selection, choice=record, warnings=selection.warnings + warnings)


def _kl(point: SweepPoint) -> float:
    return point.verdict.quality["kl"].value


def _tried(point: SweepPoint) -> dict[str, Any]:
    change = point.verdict.change.get("exact_match")
    return {
        "method": str(point.combination),
        "keep": point.selection.keep,
        "kl": point.verdict.quality["kl"].to_document(),
        "exact_match_change": change.to_document() if change is not None else None,
    }


def _tied(search: Search, point: SweepPoint, best: SweepPoint) -> bool:
    """Whether a candidate is the best one, or its paired difference to it is within noise."""
    if point is best:
        return True
    ours, theirs = search.sums(point.selection), search.sums(best.selection)
    return search.judge.draws.ratio(ours.kl - theirs.kl, theirs.tokens).low <= 0


def _reason(points: list[SweepPoint], chosen: int, best: int, tied: list[int]) -> str:
    point = points[chosen]
    reason = f"{point.combination} with a KL divergence of {_kl(point):.4f} on held-out examples"
    if len(tied) > 1:
        others = [str(points[i].combination) for i in tied if i != chosen]
        reason += f"; within noise of it: {', '.join(others[:_NAMED])}"
        reason += f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        if chosen != best:
            reason += f" (best by its figure: {points[best].combination}, {_kl(points[best]):.4f}; ties go to the "
            reason += "benchmark's preference)"
    beaten = [i for i in range(len(points)) if i not in tied]
    if beaten:
        nearest = min(beaten, key=lambda i: _kl(points[i]))
        reason += f"; clearly behind, nearest first: {points[nearest].combination} with {_kl(points[nearest]):.4f}"
    return reason + "."
