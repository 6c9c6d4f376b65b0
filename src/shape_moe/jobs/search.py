"""Selections of one trace, by any method at any keep rate, judged on one bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.architectures.loading import release_memory
from shape_moe.architectures.sizes import ModelSize
from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.errors import BudgetError, UsageError
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.comparison import Comparison
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import (
    Limit,
    Measure,
    Point,
    Recommendation,
    measure_points,
    recommend,
    rounds_of,
    steps_of,
)
from shape_moe.evaluation.layered_bench import TOGETHER, LayeredBench
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.planning import SearchPlan
from shape_moe.jobs.session import ModelSession
from shape_moe.progress import Advance, Progress
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.selection.selection import Selection
from shape_moe.units import counted

_MOST_RATES = 7
"""With so many rates of a method at once, three readings of the weights find the smallest to one percentage point."""


def open_bench(
    plan: SearchPlan,
    generation: GenerationOptions,
    limit: Limit,
    comparisons: int,
    seed: int,
    progress: Progress,
    folder: Path | None,
) -> Comparison:
    """Load the model, and let it answer the held-out examples; one that does not fit is read layer by layer.

    Args:
        plan: the session and the held-out records.
        generation: how answers are written freely.
        limit: what may be lost; of exact match, where only a part of an answer must be right, answers decide.
        comparisons: how many methods the best is picked from.
        seed: draws the resamples of intervals.
        progress: where to show progress.
        folder: where answers and judged selections are kept for a later run, None for nowhere.

    Raises:
        UsageError: where free answers decide, which a model that is read layer by layer does not give.
    """
    by_answers = generation.answer_pattern is not None and limit.kind == "max_drop"
    if plan.session.reads_layers:
        if by_answers:
            raise UsageError(
                "--answer-pattern judges free answers, for which the whole model has to be in memory: use --max-kl, or "
                "a machine that holds it."
            )
        return layered_bench(plan.session, plan.held_out, "the held-out set", comparisons, seed, folder)
    return Bench(
        plan.session.model,
        plan.session.tokenizer,
        held_out_set(plan.session, plan.held_out, "the held-out set", folder),
        generation=generation,
        by_answers=by_answers,
        seed=seed,
        comparisons=comparisons,
        folder=folder,
        progress=progress,
    )


def open_layers(session: ModelSession) -> LayeredModel:
    """A session's model, to be read layer by layer."""
    assert session.snapshot is not None
    return LayeredModel(session.snapshot, device=session.options.device, dtype=session.options.dtype)


def layered_bench(
    session: ModelSession, maker: ExampleMaker, name: str, comparisons: int, seed: int, folder: Path | None
) -> LayeredBench:
    """The bench of a model that is read layer by layer.

    Args:
        session: names the model and how it runs; a model that it holds is let go of.
        maker: the examples.
        name: what to call them.
        comparisons: how many methods the best is picked from.
        seed: draws the resamples of intervals.
        folder: where sums and hidden states are kept for a later run, None for nowhere.
    """
    model = open_layers(session)
    held_out = held_out_set(session, maker, name, folder, model=model.model)
    session.unload()
    release_memory()
    return LayeredBench(model, held_out, seed=seed, comparisons=comparisons, folder=folder, progress=session.progress)


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

    bench: Comparison
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
        title = "Looking for the smallest safe keep rate" if keep_rates is None else "Sweeping"
        most, at_once = self.most_keep or 1.0, self._rates_at_once()
        if isinstance(self.bench, LayeredBench) and keep_rates is None:
            self.progress.note(
                f"The smallest keep rate is looked for in {counted(rounds_of(most, at_once), 'round')}; each reads the "
                "weights anew."
            )
        with self.measuring(title, len(self.methods) * steps_of(keep_rates, most, at_once)) as measure:
            points = measure_points(self.methods, keep_rates, measure, self.limit, most=most, at_once=at_once)
        if not points:
            raise UsageError("No keep rate of the sweep can be met under the constraints; try larger ones.")
        return recommend(points, self.limit, lambda point: self.bench.judge(point.selection).health)

    @contextmanager
    def measuring(self, title: str, steps: int, unit: str = "point") -> Iterator[Measure]:
        """:meth:`points`, with their progress shown."""
        with self.progress.phase(title, steps, unit) as advance:
            yield lambda asked: self.points(asked, advance)

    def points(self, asked: Sequence[tuple[Method, float]], advance: Advance = lambda _: None) -> list[Point | None]:
        """Judge selections by methods at keep rates; None where none meets the budget.

        Raises:
            UsageError: when the limit says little of this model.
        """
        selections = [self._selection(method, keep) for method, keep in asked]
        possible = [selection for selection in selections if selection is not None]
        self.bench.prepare(possible)
        if possible:
            self.limit.check_dense(self.bench.dense())
        found = []
        for (method, _), selection in zip(asked, selections, strict=True):
            found.append(self._point(method, selection) if selection is not None else None)
            advance(1)
        return found

    def _rates_at_once(self) -> int:
        """How many rates of each method are judged in one round of looking for the smallest."""
        if not isinstance(self.bench, LayeredBench):
            return 1
        return max(1, min(_MOST_RATES, TOGETHER // len(self.methods)))

    def _selection(self, method: Method, keep: float) -> Selection | None:
        try:
            return self.selector.select(self.options_of(method, keep))
        except BudgetError as error:
            self.progress.note(f"{method} at keep {keep:g} is left out: {error}")
            return None

    def _point(self, method: Method, selection: Selection) -> Point:
        measured = self.bench.judge(selection, freely=False)
        return Point(
            method,
            selection,
            round(self.size.at_keep(selection.kept)),
            measured,
            meets=self.limit.met(measured),
            fits=None if self.most_keep is None else selection.kept <= round(self.most_keep * selection.total),
        )
