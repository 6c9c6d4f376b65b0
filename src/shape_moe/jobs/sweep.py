"""Sweep keep rates and methods: one trace, one loaded model, masks; nothing is written but the answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.example_maker import ANSWERS_FILE
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.errors import UsageError
from shape_moe.evaluation.comparison import POINTS_FILE
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import DEFAULT_LIMIT, KEEP_RATES, Limit, Point, Recommendation
from shape_moe.evaluation.swept import SWEEP_FILE, Sweep
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.planning import SearchPlan, held_out_tracing, plan_search
from shape_moe.jobs.search import Search, open_bench
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import kept_trace, open_trace
from shape_moe.made_with import MadeWith
from shape_moe.progress import SILENT, Progress
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.selection.method import Method, check_for_model
from shape_moe.selection.rules import check_by_priority
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.workspace import Workspace, write_json


@dataclass(frozen=True)
class SweepOptions:
    """What is swept.

    Attributes:
        keep_rates: the grid; None looks for the smallest keep rate within the limit by bisection where a limit is
            given, and takes :data:`shape_moe.evaluation.keep_rate.KEEP_RATES` where none is.
        limit: what a pruned model may lose.
        methods: how experts are chosen.
        scoring: segment weights, and the seed of everything that is drawn.
        held_out: examples to judge by.
        generation: how points answer freely before they are recommended.
        most_keep: the largest keep rate that fits the memory at hand, None for no such limit.

    Raises:
        UsageError: for a method or a keep rate that does not exist, and where nothing is to be swept.
    """

    keep_rates: tuple[float, ...] | None = None
    limit: Limit | None = None
    methods: tuple[Method, ...] = (Method(),)
    scoring: ScoreOptions = field(default_factory=ScoreOptions)
    held_out: int = HELD_OUT_SAMPLES
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    most_keep: float | None = None

    def __post_init__(self) -> None:
        if not self.methods:
            raise UsageError("Name at least one method.")
        if self.held_out < 1:
            raise UsageError(f"At least one example must be held out, not {self.held_out}.")
        for method in self.methods:
            get_scorer(method.scorer)
            check_by_priority(method.rule)
            for keep in self.keep_rates or (1.0,):
                self.select(method, keep)

    def select(self, method: Method, keep: float) -> SelectOptions:
        """What is asked of one selection."""
        return SelectOptions(keep, method, self.scoring, allow_rounding=method.equal_counts)


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
    def chosen(self) -> Point | None:
        """The operating point, None where no point is safe."""
        return self.recommendation.point


def sweep(
    model: str | PathLike[str],
    options: SweepOptions | None = None,
    out: str | PathLike[str] | None = None,
    *,
    data: ExampleOptions | DataOptions | Data | None = None,
    trace: str | PathLike[str] | None = None,
    held_out: DataOptions | Data | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> SweepResult:
    """Find out which keep rate is safe.

    Args:
        model: a folder or hub id.
        options: see :class:`SweepOptions`.
        out: folder for ``sweep.json``, the recommended selection (``recommended.json``) and the trace; None keeps the
            answer in memory. An interrupted sweep goes on from its last point.
        data: examples; without ``trace`` and ``held_out`` they are split into calibration and held-out ones. With a
            trace, what is to be known about tokens, answers and the device.
        trace: a finished trace.
        held_out: examples to judge by; those whose prompts calibration has seen are left out.
        revision: branch, tag or commit of a hub model.
        device: where to run; what ``data`` says of it counts where it is :class:`ExampleOptions`.
        dtype: in which dtype; likewise.
        stream: trace and judge layer by layer (True), or with the whole model in memory (False); None decides by free
            memory; likewise.
        trust_remote_code: run the code that comes with the model instead of Transformers' own, where there is some.
        force: replace an earlier result.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do.
    """
    options = options or SweepOptions()
    snapshot = open_snapshot(model, revision, trust_remote_code=trust_remote_code)
    for method in options.methods:
        check_for_model(method, snapshot.moe)
    seed = options.scoring.seed
    traced = open_trace(trace, snapshot, progress, force=force) if trace is not None else None
    judged_by = held_out if isinstance(held_out, DataOptions | None) else DataOptions.of(held_out, seed=seed)
    tracing = held_out_tracing(data, traced, judged_by, seed)
    if not isinstance(data, ExampleOptions):
        tracing = replace(tracing, device=device, dtype=dtype, stream=stream)
    plan = plan_search(snapshot, tracing, traced, judged_by, options.held_out, seed, progress)
    if options.limit is not None:
        options.limit.check_examples(len(plan.held_out.records), len(options.methods))
    if out is None:
        return _swept(snapshot, options, plan, progress, None)
    read = (model, snapshot.path, trace, *tracing.data.files, *plan.data.files)
    inputs = [path for path in read if path is not None]
    job = {
        "verb": "sweep",
        "options": asdict(options),
        "trace": plan.trace.info.source.get("content_hash") if plan.trace else None,
        "held_out": plan.held_out_job(),
        **plan.session.job(),
    }
    with Workspace(out, job, force=force, inputs=inputs) as work:
        result = _swept(snapshot, options, plan, progress, work.path)
        _write(result, plan, work.path)
        work.complete()
    return result


def _swept(
    snapshot: Snapshot, options: SweepOptions, plan: SearchPlan, progress: Progress, folder: Path | None
) -> SweepResult:
    """Trace, or find the trace that an interrupted sweep left in the folder; then judge and recommend."""
    trace = plan.trace
    if trace is None:
        trace = plan.session.run(None) if folder is None else kept_trace(lambda: plan.session, folder / "trace")
    limit, selector, size = options.limit or DEFAULT_LIMIT, TraceSelector(trace, options.scoring), measure(snapshot)
    rates = options.keep_rates or (None if options.limit else KEEP_RATES)
    count, seed = len(options.methods), options.scoring.seed
    with open_bench(plan, options.generation, limit, count, seed, progress, folder) as bench:
        search = Search(bench, selector, options.select, options.methods, limit, size, progress, options.most_keep)
        advice = search.recommend(rates)
        swept = Sweep(
            model=snapshot.name,
            fingerprint=fingerprint(snapshot),
            split=plan.sentence,
            comparisons=count,
            calibration=trace.info.source,
            held_out={"data": plan.data.name, "examples": len(bench.held_out.examples)},
            limit=limit,
            dense=bench.dense(),
            dense_size=size.total - size.dropped,
            points=tuple(point.described for point in advice.points),
            recommended=advice.chosen,
            smallest_within_limit=advice.smallest,
            reason=advice.reason,
            made_with=MadeWith.now(seed),
        )
        return SweepResult(swept.to_document(), advice, limit)


def _write(result: SweepResult, plan: SearchPlan, folder: Path) -> None:
    """Write the answer, and remove what only an unfinished sweep needs."""
    write_json(folder / SWEEP_FILE, result.document)
    if result.chosen is not None:
        plan.told(result.chosen.selection).save(folder / "recommended.json")
    for name in (POINTS_FILE, ANSWERS_FILE):
        (folder / name).unlink(missing_ok=True)
