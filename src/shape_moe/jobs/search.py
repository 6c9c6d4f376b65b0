"""Selections of one trace, by any method at any keep rate, judged on one bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shape_moe.architectures.sizes import ModelSize
from shape_moe.errors import BudgetError, UsageError
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import Limit, Measure, Point, Recommendation, measure_points, recommend, steps_of
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.planning import SearchPlan
from shape_moe.progress import Progress
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, TraceSelector


def open_bench(
    plan: SearchPlan,
    generation: GenerationOptions,
    limit: Limit,
    comparisons: int,
    seed: int,
    progress: Progress,
    folder: Path | None,
) -> Bench:
    """Load the model, and let it answer the held-out examples.

    Args:
        plan: the session and the held-out records.
        generation: how answers are written freely.
        limit: what may be lost; of exact match, where only a part of an answer must be right, answers decide.
        comparisons: how many methods the best is picked from.
        seed: draws the resamples of intervals.
        progress: where to show progress.
        folder: where answers and judged selections are kept for a later run, None for nowhere.
    """
    return Bench(
        plan.session.model,
        plan.session.tokenizer,
        held_out_set(plan.session, plan.held_out, "the held-out set", folder),
        generation=generation,
        by_answers=generation.answer_pattern is not None and limit.kind == "max_drop",
        seed=seed,
        comparisons=comparisons,
        folder=folder,
        progress=progress,
    )


@dataclass(frozen=True)
class Search:
    """Judges methods at keep rates.

    Attributes:
        bench: judges selections.
        selector: selects from the trace.
        options_of: what is asked of a selection by a method at a keep rate.
        methods: the methods.
        limit: what may be lost.
        size: what a selection's weights take.
        progress: where to show progress.
        most_keep: the largest keep rate that fits the memory at hand, None for no such limit.
    """

    bench: Bench
    selector: TraceSelector
    options_of: Callable[[Method, float], SelectOptions]
    methods: Sequence[Method]
    limit: Limit
    size: ModelSize
    progress: Progress
    most_keep: float | None = None

    def recommend(self, keep_rates: Sequence[float] | None) -> Recommendation:
        """Judge all points, and find the operating point.

        Args:
            keep_rates: what to judge; None looks for the smallest keep rate within the limit.

        Raises:
            UsageError: when the limit says little of this model, or no keep rate can be met.
        """
        self.limit.check_dense(self.bench.dense())
        title = "Looking for the smallest safe keep rate" if keep_rates is None else "Sweeping"
        most = self.most_keep or 1.0
        with self.measuring(title, len(self.methods) * steps_of(keep_rates, most)) as measure:
            points = measure_points(self.methods, keep_rates, measure, self.limit, most=most)
        if not points:
            raise UsageError("No keep rate of the sweep can be met under the constraints; try larger ones.")
        return recommend(points, self.limit, lambda point: self.bench.judge(point.selection).health)

    @contextmanager
    def measuring(self, title: str, steps: int, unit: str = "point") -> Iterator[Measure]:
        """:meth:`point`, with its progress shown."""
        with self.progress.phase(title, steps, unit) as advance:

            def measure(method: Method, keep: float) -> Point | None:
                point = self.point(method, keep)
                advance(1)
                return point

            yield measure

    def point(self, method: Method, keep: float) -> Point | None:
        """Judge one selection; None where none meets the budget."""
        try:
            selection = self.selector.select(self.options_of(method, keep))
        except BudgetError as error:
            self.progress.note(f"{method} at keep {keep:g} is left out: {error}")
            return None
        measured = self.bench.judge(selection, freely=False)
        return Point(
            method,
            selection,
            round(self.size.at_keep(selection.kept)),
            measured,
            meets=self.limit.met(measured),
            fits=None if self.most_keep is None else selection.kept <= round(self.most_keep * selection.total),
        )
