"""Search for a keep rate: selections of one trace judged as masks on one loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.sizes import ModelSize, measure
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import BudgetError, UsageError
from shape_moe.evaluation.generation import Generated, GenerationOptions
from shape_moe.evaluation.intervals import examples_for, least_fall
from shape_moe.evaluation.judge import Judge
from shape_moe.evaluation.keep_rate import (
    Combination,
    Limit,
    Measure,
    Recommendation,
    SweepPoint,
    bisect,
    bisection_steps,
    grid,
    recommend,
)
from shape_moe.evaluation.measures import Health, health
from shape_moe.evaluation.swept import Sweep
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES, held_out_set
from shape_moe.jobs.planning import Plan
from shape_moe.journal import Journal
from shape_moe.made_with import MadeWith
from shape_moe.progress import Progress
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.selection.selection import ROUTINGS, Selection
from shape_moe.tracing.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25)
POINTS_FILE = "points.jsonl"
"""Sums of finished points, while a search is unfinished."""
DEFAULT_LIMIT = Limit("max_kl", 0.02)
"""What a recommendation keeps to when no limit is given."""


@dataclass(frozen=True)
class SweepOptions:
    """What is swept.

    Attributes:
        keep_rates: the grid; None looks for the smallest keep rate within the limit by bisection where a limit is
            given, and takes :data:`KEEP_RATES` where none is.
        limit: what a pruned model may lose.
        scorers: how experts are valued.
        rules: how layers share the budget.
        routings: ``drop``, ``reroute`` or both.
        target: ``ragged`` or ``stock``.
        scoring: segment weights, and the seed of everything that is drawn.
        held_out: examples to judge by.
        generation: how points answer freely before they are recommended.
        most_keep: the largest keep rate that fits the memory at hand, None for no such limit.
        constraints: skipped layers, protected experts and the like, which hold for every point; its keep rate, rule,
            routing and target are not looked at.
    """

    keep_rates: tuple[float, ...] | None = None
    limit: Limit | None = None
    scorers: tuple[str, ...] = ("shape",)
    rules: tuple[str, ...] = ("coverage",)
    routings: tuple[str, ...] = ("drop",)
    target: str = "ragged"
    scoring: ScoreOptions = field(default_factory=ScoreOptions)
    held_out: int = HELD_OUT_SAMPLES
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    most_keep: float | None = None
    constraints: SelectOptions | None = None

    def __post_init__(self) -> None:
        for name in ("scorers", "rules", "routings"):
            if not getattr(self, name):
                raise UsageError(f"Name at least one of the {name}.")
        if self.held_out < 1:
            raise UsageError(f"At least one example must be held out, not {self.held_out}.")
        for scorer in self.scorers:
            get_scorer(scorer)
        for routing in self.routings:
            if routing not in ROUTINGS:
                raise UsageError(f"Routing must be drop or reroute, not {routing!r}.")
        for combination in self.combinations():
            SelectOptions(0.5, combination.rule, combination.routing, combination.target)
        for keep in self.keep_rates or ():
            SelectOptions(keep)

    def combinations(self) -> list[Combination]:
        """Every scorer with every rule and routing."""
        return [
            Combination(scorer, rule, routing, self.target)  # type: ignore[arg-type]  # checked with the others
            for scorer in self.scorers
            for rule in self.rules
            for routing in self.routings
        ]


@dataclass(frozen=True)
class SweepResult:
    """A sweep's answer.

    Attributes:
        document: what ``sweep.json`` holds.
        recommendation: the points and the operating point.
        limit: what the recommendation keeps to.
    """

    document: dict[str, Any]
    recommendation: Recommendation
    limit: Limit

    @property
    def chosen(self) -> SweepPoint | None:
        """The operating point, None where no point is safe."""
        index = self.recommendation.chosen
        return None if index is None else self.recommendation.points[index]


class Search:
    """Judges selections from one trace on one loaded model.

    Args:
        snapshot: the model on disk.
        plan: the session and the held-out records.
        trace: the trace to select from.
        options: what to search; its combinations are not looked at.
        combinations: the ways to choose; intervals hold for all of them together.
        progress: where to show progress.
        folder: where answers and finished points are kept for a later run, None for nowhere.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        plan: Plan,
        trace: Trace,
        options: SweepOptions,
        combinations: Sequence[Combination],
        progress: Progress,
        folder: Path | None = None,
    ) -> None:
        self.options, self.plan, self.trace, self.progress = options, plan, trace, progress
        self.combinations = combinations
        self.selector = TraceSelector(trace, options.scoring)
        self.size: ModelSize = measure(snapshot)
        self.snapshot = snapshot
        self.limit = options.limit or DEFAULT_LIMIT
        held_out = held_out_set(plan.session, plan.held_out, "The held-out set", folder)
        self.model: PreTrainedModel = plan.session.model
        count, generation = len(held_out.examples), options.generation
        if self._answers_decide():
            generation = replace(generation, examples=count)
        with progress.phase("Judging the dense model", count, "example") as advance:
            self.judge = Judge(
                self.model,
                plan.session.tokenizer,
                held_out,
                generation=generation,
                seed=options.scoring.seed,
                comparisons=len(combinations),
                advance=advance,
            )
        file = folder / POINTS_FILE if folder is not None else None
        self.known: Journal[dict[str, list[Any]]] = Journal(file, "key", "sums")
        self._answers: dict[str, Generated | None] = {}

    def run(self) -> SweepResult:
        """Judge all points, and recommend one."""
        options, combinations = self.options, self.combinations
        self._check_limit()
        if options.keep_rates is None and options.limit is not None:
            most = options.most_keep or 1.0
            steps = len(combinations) * bisection_steps(most)
            with self.measuring("Looking for the smallest safe keep rate", steps) as measure:
                points = [p for c in combinations for p in bisect(c, measure, self.limit, most=most)]
        else:
            rates = options.keep_rates or KEEP_RATES
            with self.measuring("Sweeping", len(combinations) * len(rates)) as measure:
                points = grid(combinations, rates, measure)
        if not points:
            raise UsageError("No keep rate of the sweep can be met under the constraints; try larger ones.")
        advice = recommend(points, self.limit, self.health)
        return SweepResult(self._sweep(advice).to_document(), advice, self.limit)

    @contextmanager
    def measuring(self, title: str, steps: int, unit: str = "point") -> Iterator[Measure]:
        """:meth:`point`, with its progress shown."""
        with self.progress.phase(title, steps, unit) as advance:

            def measure(combination: Combination, keep: float) -> SweepPoint | None:
                point = self.point(combination, keep)
                advance(1)
                return point

            yield measure

    def point(self, combination: Combination, keep: float) -> SweepPoint | None:
        """Judge one selection; None where none meets the budget."""
        base = self.options.constraints or SelectOptions(keep)
        asked = replace(
            base,
            keep=keep,
            rule=combination.rule,
            routing=combination.routing,
            target=combination.target,
            tolerance=None,
            allow_rounding=base.allow_rounding or combination.target == "stock",
        )
        try:
            selection = self.selector.select(asked, combination.scorer)
        except BudgetError as error:
            self.progress.note(f"{combination} at keep {keep:g} is left out: {error}")
            return None
        verdict = self.judge.verdict(self.sums(selection))
        most = self.options.most_keep
        return SweepPoint(
            combination,
            selection,
            round(self.size.at_keep(selection.kept)),
            verdict,
            meets=self.limit.met(verdict),
            fits=None if most is None else selection.kept <= round(most * selection.total),
        )

    def sums(self, selection: Selection) -> TeacherForced:
        """Sums of a selection, judged once; exact match is that of written answers where those decide."""
        if selection.digest in self.known:
            return TeacherForced.from_items(self.known[selection.digest])
        sums = self.judge.compare_masked(self.model, selection)
        made = self._answered(selection) if self._answers_decide() else None
        sums = sums if made is None else self.judge.by_answers(sums, made)
        self.known.put(selection.digest, sums.to_items())
        return sums

    def _answered(self, selection: Selection) -> Generated | None:
        """The free-running answers with a selection, made once."""
        if selection.digest not in self._answers:
            self._answers[selection.digest] = self.judge.answer_masked(self.model, selection)
        return self._answers[selection.digest]

    def _answers_decide(self) -> bool:
        """Whether exact match is that of a part of the written answers, so that every point has to write them."""
        return self.options.generation.answer_pattern is not None and self.limit.kind == "max_drop"

    def _check_limit(self) -> None:
        """Refuse a limit on exact match where the dense model itself has none to lose."""
        if self.limit.kind != "max_drop":
            return
        if self._answers_decide():
            self.judge.judge_dense_by_answers(self.model)
        answered = self.judge.answered
        right = float(self.judge.dense.exact[answered].mean()) if answered else 0.0
        if right < 0.5:
            raise UsageError(
                f"The dense model gives the exact response to only {right:.0%} of the held-out examples, so a fall of "
                "that share says little: name the part that must be right with --answer-pattern REGEX, or use --max-kl."
            )

    def health(self, point: SweepPoint) -> Health | None:
        """Let a point answer freely, beside the dense model."""
        dense = self.judge.answer_as_dense(self.model)
        made = self._answered(point.selection)
        return health(made, dense, self.judge.draws) if made is not None else None

    def _sweep(self, advice: Recommendation) -> Sweep:
        self.judge.answer_as_dense(self.model)
        return Sweep(
            model=self.snapshot.name,
            fingerprint=fingerprint(self.snapshot),
            split=self.plan.sentence,
            comparisons=self.judge.draws.comparisons,
            calibration=self.trace.info.source,
            held_out={"data": self.plan.data.source, "examples": len(self.judge.held_out.examples)},
            limit=self.limit,
            dense=self.judge.dense_verdict(),
            dense_size=self.size.total - self.size.dropped,
            points=tuple(point.described for point in advice.points),
            recommended=advice.chosen,
            smallest_within_limit=advice.smallest,
            reason=advice.reason,
            made_with=MadeWith.now(self.options.scoring.seed),
        )


def check_examples(plan: Plan, limit: Limit | None, combinations: int) -> None:
    """Refuse a limit that no selection could be shown to meet, because there are too few held-out examples.

    Args:
        plan: the held-out examples.
        limit: what may be lost.
        combinations: how many the best is picked from.

    Raises:
        UsageError: with the number that would do.
    """
    count = len(plan.held_out.records)
    if limit is None or limit.kind != "max_drop" or least_fall(count, combinations) <= limit.value:
        return
    together = f" for {combinations} combinations together" if combinations > 1 else ""
    raise UsageError(
        f"{count} held-out examples cannot show a fall of exact match below {least_fall(count, combinations):.1%}"
        f"{together}, even if no answer changes: judge by {examples_for(limit.value, combinations):,} or more "
        "(--held-out-samples), allow a larger fall, or use --max-kl."
    )
