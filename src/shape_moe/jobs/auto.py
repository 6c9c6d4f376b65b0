"""How ``auto`` chooses: the method that loses least on held-out examples, or the smallest keep rate within a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.comparison import Comparison
from shape_moe.evaluation.keep_rate import DEFAULT_LIMIT, Measure, Point
from shape_moe.evaluation.layered_bench import LayeredBench
from shape_moe.jobs.choice import ChoiceOptions, methods_to_try
from shape_moe.jobs.curves import CurveMaker
from shape_moe.jobs.planning import SearchPlan
from shape_moe.jobs.search import Search, open_bench
from shape_moe.progress import Progress
from shape_moe.selection.method import Method
from shape_moe.selection.recommended import SOURCE, in_order
from shape_moe.selection.rules import get_rule
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace
from shape_moe.units import counted, readable_duration, readable_kl

_NAMED = 3
clock: Callable[[], float] = time.perf_counter


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
        folder: where answers, layer curves and judged selections are kept for a later run.

    Returns:
        The selection, with what was tried in its ``choice``.

    Raises:
        ShapeMoeError: when nothing stays within the limit.
    """
    began = clock()
    methods = methods_to_try(asked.method, options, trace.info.top_k, trace.statistics, snapshot.moe)
    limit, scoring = options.limit or DEFAULT_LIMIT, asked.scoring
    with open_bench(plan, options.generation, limit, len(methods), scoring.seed, progress, folder) as bench:
        curves = None
        measurable = plan.calibration is not None and not plan.session.reads_layers
        if measurable and any(get_rule(method.rule).by_curves for method in methods):
            assert plan.calibration is not None
            curves = CurveMaker(plan.session, plan.calibration, trace, scoring, progress, folder=folder)

        def options_of(method: Method, keep: float) -> SelectOptions:
            rounding = asked.allow_rounding or method.equal_counts
            made = curves.of(method) if curves is not None and get_rule(method.rule).by_curves else asked.curves
            return replace(asked, keep=keep, method=method, tolerance=None, allow_rounding=rounding, curves=made)

        selector, size = TraceSelector(trace, scoring), measure(snapshot)
        search = Search(bench, selector, options_of, methods, limit, size, progress)
        if options.limit is not None:
            selection, record = _smallest(search)
        else:
            selection, record = Choice(search, asked.keep, options, curves).closest()
        record |= {
            "examples": len(bench.held_out.examples),
            "split": plan.sentence,
            "effort": options.effort,
            "seconds": round(clock() - began, 1),
        }
        return plan.told(replace(selection, choice=record))


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
        "tried": [_entry(point, search.bench, advice.point) for point in advice.points],
        "reason": advice.reason,
    }


class Choice:
    """Looks for the method that stays closest to the dense model at one keep rate.

    Methods without layer curves are judged in every routing; the routing that does best is settled, and only in that
    are layers measured (in all of them with effort ``thorough``).

    Args:
        search: judges methods.
        keep: the keep rate.
        options: what may be tried, and what that may cost.
        curves: makes layer curves, None where there are no examples to make them from.
    """

    def __init__(self, search: Search, keep: float, options: ChoiceOptions, curves: CurveMaker | None) -> None:
        self.search, self.keep, self.options, self.curves = search, keep, options, curves
        ordered = in_order(search.methods, keep)
        self.plain = [method for method in ordered if not get_rule(method.rule).by_curves]
        self.measured = [method for method in ordered if get_rule(method.rule).by_curves]
        self.points: list[Point] = []
        self.passes = 0.0

    def closest(self) -> tuple[Selection, dict[str, Any]]:
        """The selection closest to the dense model, and what was tried; ties within noise go to the preferred one.

        Raises:
            UsageError: when no method meets the keep rate.
        """
        measured = self._affordable()
        steps = len(self.plain) + len(measured)
        with self.search.measuring("Trying scorers, rules and routings", steps, "candidate") as judge:
            began = clock()
            together = isinstance(self.search.bench, LayeredBench)
            first = self.plain if together else self.plain[:1]
            self._judge(first, judge)
            if not together:
                self._tell_time(clock() - began, measured)
            self._judge(self.plain[len(first) :], judge)
            for method in self._settled(measured):
                self._judge([method], judge)
        if not self.points:
            raise UsageError(
                f"No candidate can keep {self.keep:g} of the experts under the constraints; try a larger rate."
            )
        return self._decided()

    def _judge(self, methods: Sequence[Method], judge: Measure) -> None:
        found = judge([(method, self.keep) for method in methods])
        self.points += [point for point in found if point is not None]

    def _affordable(self) -> list[Method]:
        """One method for every set of curves that will be made; what a set may cost is settled with that."""
        if self.curves is None or not self.measured:
            return []
        routings = {method.routed for method in self.measured}
        sets = len({method.scorer for method in self.measured}) * (len(routings) if self._every_routing else 1)
        held = sum(len(example.tokens) for example in self.search.bench.held_out.examples)
        per_candidate = held / self.curves.tokens
        judged = 1 + per_candidate * (1 + len(self.plain) + sets)
        self.passes = judged
        if self.options.passes is not None:
            self.curves.budget = max(0.0, self.options.passes - judged) / sets
        first = self.measured[0].routed
        chosen = [method for method in self.measured if self._every_routing or method.routed == first]
        self.passes += sum(self.curves.passes(method) for method in chosen)
        return chosen

    @property
    def _every_routing(self) -> bool:
        return self.options.effort == "thorough"

    def _settled(self, measured: Sequence[Method]) -> list[Method]:
        """The methods to measure layers for, in the routing that the others did best in."""
        if not measured or self._every_routing or not self.points:
            return list(measured)
        settled = self._preferred_of_tied().method
        return [replace(method, routing=settled.routing, gate_scale=settled.gate_scale) for method in measured]

    def _tell_time(self, first: float, measured: Sequence[Method]) -> None:
        """How long the rest takes, by the first candidate and one pass over examples that layers are measured by."""
        left = max(len(self.plain) - 1, 0) + len(measured)
        seconds = left * max(first, self.search.bench.seconds)
        seconds += sum(self.curves.seconds(method) for method in measured) if self.curves is not None else 0.0
        cost = f" (as much as {self.passes:.0f} forward passes of the calibration set)" if self.passes else ""
        self.search.progress.note(
            f"Choosing among {counted(left + 1, 'candidate')}{cost} takes about {readable_duration(seconds)}; "
            "--effort fast takes the recommended method instead."
        )

    def _preferred_of_tied(self) -> Point:
        return self.points[self._tied(self._best())[0]]

    def _best(self) -> int:
        return min(range(len(self.points)), key=lambda i: (self.search.bench.loss(self.points[i].selection), i))

    def _tied(self, best: int) -> list[int]:
        """The points that are the best one, or as good but for noise, preferred ones first."""
        tied = tied_with(best, self.points, self.search.bench)
        order = in_order([self.points[i].method for i in tied], self.keep)
        return sorted(tied, key=lambda i: order.index(self.points[i].method))

    def _decided(self) -> tuple[Selection, dict[str, Any]]:
        bench, points = self.search.bench, self.points
        best = self._best()
        tied = self._tied(best)
        chosen = points[tied[0]]
        health = bench.judge(chosen.selection).health
        warnings = tuple(f"On held-out examples, {complaint}." for complaint in health.complaints) if health else ()
        selection = replace(chosen.selection, warnings=chosen.selection.warnings + warnings)
        return selection, {
            "how": "the candidate closest to the dense model on held-out examples",
            "tried": [_entry(point, bench, chosen) for point in points],
            "best": str(points[best].method),
            "tied": [str(points[i].method) for i in tied],
            "ties_go_to": SOURCE,
            "passes": round(self.passes, 1),
            "reason": _reason(points, bench, best, tied),
        }


def tied_with(best: int, points: Sequence[Point], bench: Comparison) -> list[int]:
    """Which points are the best one, or as good but for noise, in their order."""
    return [i for i, point in enumerate(points) if i == best or bench.tied(point.selection, points[best].selection)]


def _entry(point: Point, bench: Comparison, chosen: Point) -> dict[str, Any]:
    """What is told of a point that was tried."""
    change = point.measured.change.get("exact_match")
    classes = bench.losses(point.selection)
    return {
        "method": str(point.method),
        "keep": point.selection.keep,
        "kl": point.measured.quality["kl"].to_document(),
        "loss": max(classes.values()),
        "classes": classes if len(classes) > 1 else {},
        "behind": bench.behind(point.selection, chosen.selection).to_document(),
        "exact_match_change": change.to_document() if change is not None else None,
    }


def _reason(points: Sequence[Point], bench: Comparison, best: int, tied: Sequence[int]) -> str:
    def loss(place: int) -> float:
        return bench.loss(points[place].selection)

    chosen = tied[0]
    where = "on held-out examples"
    if len(classes := bench.losses(points[chosen].selection)) > 1:
        where += f" of the class that it costs most ({max(classes, key=lambda name: classes[name])})"
    reason = f"{points[chosen].method} with a KL divergence of {readable_kl(loss(chosen))} {where}"
    if len(tied) > 1:
        others = [str(points[i].method) for i in tied if i != chosen]
        reason += f"; within noise of it: {' or '.join(others[:_NAMED])}"
        reason += f" or {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        if chosen != best:
            reason += f" (best by its figure: {points[best].method}, {readable_kl(loss(best))}; ties go to the "
            reason += "benchmark's preference)"
    beaten = [i for i in range(len(points)) if i not in tied]
    if beaten:
        nearest = min(beaten, key=loss)
        reason += f"; clearly behind, nearest first: {points[nearest].method}"
        figure = readable_kl(loss(nearest))
        reason += f" with {figure}" if figure != readable_kl(loss(chosen)) else ""
    return reason + "."
