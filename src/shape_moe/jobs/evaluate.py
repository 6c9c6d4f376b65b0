"""Evaluate pruned checkpoints and selections beside the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.loading import load_model, load_tokenizer, release_memory
from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions, Record
from shape_moe.calibration.sources import Data
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.comparison import Comparison
from shape_moe.evaluation.conclusion import conclude
from shape_moe.evaluation.evaluated import ALSO, TASK, Evaluated, Evaluation
from shape_moe.evaluation.faithfulness import FEWEST_RANDOM, Faithfulness, faithfulness
from shape_moe.evaluation.footprint import Workload, measure_footprint
from shape_moe.evaluation.forgotten import general_records
from shape_moe.evaluation.generation import Generated, GenerationOptions
from shape_moe.evaluation.harness import TaskOptions, check_chat_template, check_tasks, run_tasks, run_tasks_with_vllm
from shape_moe.evaluation.questions import Questions, Replies
from shape_moe.evaluation.subjects import Candidate, open_candidates, scores_of
from shape_moe.evaluation.task_results import TaskResult, task_changes
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.verdict import MAX_DROP, Verdict, check_max_drop
from shape_moe.jobs.evaluate_by_layers import LIKELIHOOD_ALONE, NeedsWholeModel, layered_benches
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES, held_out_set
from shape_moe.jobs.judging_plan import JudgingPlan, check_minutes, plan_judging
from shape_moe.jobs.session import ExampleOptions, ModelSession, as_example_options, load_original
from shape_moe.jobs.trace import open_trace
from shape_moe.made_with import MadeWith
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.masks import masked
from shape_moe.scoring.scores import Scores
from shape_moe.selection.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured.

    Attributes:
        also: further examples, of what the pruned model was not made for.
        by: field of the records whose classes are judged one by one.
        generation: how models answer freely, None for not at all.
        tasks: tasks of lm-evaluation-harness, None for none.
        footprint: what to time, None to leave memory and speed out; other work on the machine spoils the figures.
        faithfulness: how many random selections every selection is compared with, 0 for none.
        trace: trace of selections given as files, and of checkpoints that hold none; faithfulness needs one.
        max_drop: the fall, as a share, that the verdict *safe* allows.
        general: ask general prompts of many kinds as well: what was forgotten off the task.
        minutes: the longest that judging may take: of what would take longer, less is judged, and that is said; None
            for any time. Loading, tasks, memory and speed are not counted.
        seed: draws samples, resamples and random selections.
    """

    also: DataOptions | None = None
    by: str | None = None
    generation: GenerationOptions | None = field(default_factory=GenerationOptions)
    tasks: TaskOptions | None = None
    footprint: Workload | None = None
    faithfulness: int = 0
    trace: str | None = None
    max_drop: float = MAX_DROP
    general: bool = True
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_max_drop(self.max_drop)
        check_minutes(self.minutes)
        if self.faithfulness and self.faithfulness < FEWEST_RANDOM:
            raise UsageError(f"Faithfulness needs at least {FEWEST_RANDOM} random selections, not {self.faithfulness}.")


def evaluate(
    model: str | PathLike[str],
    candidates: Sequence[str | PathLike[str] | Selection] = (),
    *,
    data: ExampleOptions | DataOptions | Data | None = None,
    options: EvaluateOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Evaluation:
    """Judge the dense model, and pruned ones beside it.

    Args:
        model: the dense model, a folder or hub id.
        candidates: folders of checkpoints, selection files or selections; the latter two are judged as masks on the
            dense model, and nothing is written.
        data: held-out examples: a file (of which at most 400 records are used), or options that say more; None where
            tasks alone are asked for.
        options: see :class:`EvaluateOptions`.
        revision: branch, tag or commit of the dense model, where it is on the hub.
        device: where to run; what ``data`` says of it counts where it is :class:`ExampleOptions`.
        dtype: in which dtype; likewise.
        trust_remote_code: run the code that comes with the model instead of Transformers' own, where there is some.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do.
    """
    options = options or EvaluateOptions()
    if data is None and options.tasks is None:
        raise UsageError("Give held-out examples (--data), tasks (--tasks), or both.")
    if data is None and (options.also or options.by or options.faithfulness):
        raise UsageError("--also, --by and --faithfulness go with held-out examples: give --data.")
    tracing = None
    if data is not None:
        tracing = as_example_options(data, HELD_OUT_SAMPLES)
        if not isinstance(data, ExampleOptions):
            tracing = replace(tracing, device=device, dtype=dtype)
        if options.by is not None:
            if tracing.data.stratify not in {None, options.by}:
                raise UsageError("--by and --stratify name different fields; leave one of them out.")
            tracing = replace(tracing, data=replace(tracing.data, stratify=options.by))
        device, dtype = tracing.device, tracing.dtype
    snapshot = open_snapshot(model, revision, trust_remote_code=trust_remote_code)
    trace = open_trace(options.trace, snapshot, progress, force=True) if options.trace is not None else None
    known = open_candidates(candidates, snapshot, trace)
    if options.tasks is not None:
        check_tasks(options.tasks.names, options.tasks.engine)
    return _Run(snapshot, known, tracing, options, (device, dtype), progress).carry_out()


def _complaints(found: Evaluated, name: str) -> tuple[str, ...]:
    health = found.sets[name].health
    return health.complaints if health is not None else ()


class _Run:
    """One evaluation on its way: the dense model first, masks on it, then every checkpoint by itself."""

    def __init__(
        self,
        snapshot: Snapshot,
        candidates: list[Candidate],
        tracing: ExampleOptions | None,
        options: EvaluateOptions,
        placement: tuple[str, str],
        progress: Progress,
    ) -> None:
        self.snapshot, self.candidates, self.tracing = snapshot, candidates, tracing
        self.options, self.progress = options, progress
        self.device, self.dtype = placement
        self.notes: list[str] = []
        self.size = measure(snapshot)
        self.benches: Mapping[str, Comparison] = {}
        self.asked: list[Record] = []
        self.questions: Questions | None = None
        self.scores: dict[str, Scores] = {}
        self.session: ModelSession | None = None
        self.tokenizer = load_tokenizer(snapshot.path, trust_remote_code=snapshot.trust_remote_code)
        if options.tasks is not None and options.tasks.engine != "vllm":
            check_chat_template(options.tasks, self.tokenizer)
        if tracing is None:
            return
        self._check_faithfulness()
        records = load_records(tracing.data, progress)
        self._warn_of_overlap(records, tracing.data)
        self.session = ModelSession.open(snapshot, tracing, self.tokenizer, progress, records)

    def _check_faithfulness(self) -> None:
        """Find the values that selections were made from; what has none would else show when all is judged."""
        for entry in self.candidates if self.options.faithfulness else ():
            if entry.selection is None:
                continue
            if entry.trace is None:
                raise UsageError(f"--faithfulness needs the trace that {entry.name} was made from: give --trace TRACE.")
            try:
                self.scores[entry.name] = scores_of(entry.selection, entry.trace)
            except UsageError as error:
                raise UsageError(f"--faithfulness cannot value the experts of {entry.name} anew: {error}") from error

    def _warn_of_overlap(self, records: list[Any], data: DataOptions) -> None:
        for entry in self.candidates:
            seen = entry.seen.count(records)
            if seen:
                self.notes.append(
                    f"{seen} of {len(records)} examples of {data.name} were used to calibrate {entry.name}: its "
                    "figures look better than they are. Give examples that it has not seen."
                )

    def carry_out(self) -> Evaluation:
        """Judge everything."""
        tasks = self.options.tasks
        if self.session is None and tasks is not None and tasks.engine == "vllm":
            models, checks = self._described()
        else:
            models, checks = self._judged_on_dense()
            release_memory()
            models += [self._checkpoint(entry, entry.snapshot) for entry in self.candidates if entry.snapshot]
        release_memory()
        for bench in self.benches.values():
            bench.close()
        if self.questions is not None:
            self.questions.close()
        order = {name: i for i, name in enumerate([self.snapshot.name, *(entry.name for entry in self.candidates)])}
        models.sort(key=lambda found: order[found.name])
        self._run_vllm_tasks(models)
        self._compare_tasks(models)
        self._measure_footprints(models)
        also, asked = self.options.also, self.tracing
        return Evaluation(
            model=self.snapshot.name,
            fingerprint=fingerprint(self.snapshot),
            data=asked.data.name if asked else None,
            also=also.source if also else None,
            examples=len(self.benches[TASK].held_out.examples) if self.benches else 0,
            by=self.options.by,
            models=tuple(models),
            faithfulness=tuple(checks),
            notes=tuple(self.notes),
            made_with=MadeWith.now(self.options.seed),
        )

    def _described(self) -> tuple[list[Evaluated], list[Faithfulness]]:
        """All models without a figure: vLLM loads them itself."""
        models = [Evaluated(self.snapshot.name, "dense", None, self.snapshot.total_bytes)]
        for entry in self.candidates:
            kind = "checkpoint" if entry.snapshot else "mask"
            kept = entry.selection.kept if entry.selection else self.size.num_experts
            size = entry.snapshot.total_bytes if entry.snapshot else round(self.size.at_keep(kept))
            models.append(Evaluated(entry.name, kind, entry.selection, size))
        return models, []

    def _judged_on_dense(self) -> tuple[list[Evaluated], list[Faithfulness]]:
        """The dense model and all masks on it, and what faithfulness says of every selection."""
        if self.session is not None and self.session.reads_layers:
            return self._judged_by_layers(self.session)
        if self.session is not None:
            model = self.session.model
            plan = self._plan(self.session)
            self.benches = self._open_benches(self.session, plan)
            self._ask_dense(self.session, plan)
        else:
            model = load_original(self.snapshot, self.device, self.dtype, self.progress)
        dense = Evaluated(self.snapshot.name, "dense", None, self.snapshot.total_bytes)
        dense.sets = {name: bench.dense() for name, bench in self.benches.items()}
        dense.tasks = self._tasks(model)
        models, checks = [dense], []
        for entry in self.candidates:
            if entry.snapshot is None:
                models.append(self._masked(entry, model))
            if self.options.faithfulness and entry.selection is not None:
                checks.append(self._faithfulness(entry, entry.selection))
        for bench in self.benches.values():
            bench.unload()
        if self.session is not None:
            self.session.unload()
        return models, checks

    def _judged_by_layers(self, session: ModelSession) -> tuple[list[Evaluated], list[Faithfulness]]:
        """The same of a dense model that is not in memory: all masks in one reading of the weights for each set."""
        options, generation, tasks = self.options, self.options.generation, self.options.tasks
        NeedsWholeModel(
            tasks=tasks is not None and tasks.engine != "vllm",
            answer_pattern=generation is not None and generation.answer_pattern is not None,
        ).refuse()
        self.benches = layered_benches(session, self._sources(session, session.calibrator), options.seed)
        self.notes.append(LIKELIHOOD_ALONE)
        self._know_asked(session)
        masks = [entry for entry in self.candidates if entry.snapshot is None and entry.selection is not None]
        for bench in self.benches.values():
            bench.prepare([entry.selection for entry in masks if entry.selection is not None])
        dense = Evaluated(self.snapshot.name, "dense", None, self.snapshot.total_bytes)
        dense.sets = {name: bench.dense() for name, bench in self.benches.items()}
        models = [dense, *(self._found_mask(entry, Replies()) for entry in masks)]
        chosen = [(entry, entry.selection) for entry in self.candidates if options.faithfulness and entry.selection]
        return models, [self._faithfulness(entry, selection) for entry, selection in chosen]

    def _plan(self, session: ModelSession) -> JudgingPlan:
        """How much is judged; how long that takes is said."""
        generation, others = self.options.generation, len(self.candidates)
        plan = plan_judging(
            session,
            session.calibrator,
            answers=generation.examples if generation else 0,
            general=len(general_records()) if self.options.general and others else 0,
            others=others,
            minutes=self.options.minutes,
        )
        self.progress.note(f"{plan.sentence}.")
        self.notes += [plan.note] if plan.note else []
        return plan

    def _sources(self, session: ModelSession, task: ExampleMaker) -> dict[str, ExampleMaker]:
        """The sets of examples."""
        also = self.options.also
        if also is None:
            return {TASK: task}
        return {TASK: task, ALSO: session.calibrator_of(load_records(also, self.progress), also)}

    def _open_benches(self, session: ModelSession, plan: JudgingPlan) -> dict[str, Bench]:
        sources, generation = self._sources(session, plan.maker), self.options.generation
        if generation is not None:
            generation = replace(generation, examples=max(1, min(generation.examples, plan.amounts.answers)))
        return {
            name: Bench(
                session.model,
                session.tokenizer,
                held_out_set(session, maker, maker.data.name),
                generation=generation,
                seed=self.options.seed,
                progress=self.progress,
            )
            for name, maker in sources.items()
        }

    def _know_asked(self, session: ModelSession) -> None:
        """Find the records that are judged by."""
        by_index = {record.index: record for record in session.calibrator.records}
        self.asked = [by_index[example.index] for example in self.benches[TASK].held_out.examples]

    def _ask_dense(self, session: ModelSession, plan: JudgingPlan) -> None:
        """Let the dense model answer what a bench does not ask."""
        self._know_asked(session)
        if self.candidates:
            self.questions = Questions(
                session.model,
                session.calibrator.tokeniser,
                self.asked,
                general=plan.amounts.general,
                most=plan.amounts.calls,
                batch_size=session.options.answers.batch_size,
                progress=self.progress,
            )

    def _masked(self, entry: Candidate, model: PreTrainedModel) -> Evaluated:
        assert entry.selection is not None
        with masked(model, entry.selection):
            replies, tasks = self._ask(entry, model), self._tasks(model)
        found = self._found_mask(entry, replies)
        found.tasks = tasks
        return found

    def _found_mask(self, entry: Candidate, replies: Replies) -> Evaluated:
        """What is found of a selection as a mask."""
        assert entry.selection is not None
        found = Evaluated(entry.name, "mask", entry.selection, round(self.size.at_keep(entry.selection.kept)))
        self._judge(found, entry.selection, replies)
        return found

    def _checkpoint(self, entry: Candidate, snapshot: Snapshot) -> Evaluated:
        release_memory()
        with self.progress.phase(f"Loading {entry.name}", 1, "model") as advance:
            model = load_model(snapshot, device=self.device, dtype=self.dtype, note=self.progress.note)
            advance(1)
        found = Evaluated(entry.name, "checkpoint", entry.selection, snapshot.total_bytes)
        self._judge(found, model, self._ask(entry, model))
        found.tasks = self._tasks(model)
        return found

    def _ask(self, entry: Candidate, model: PreTrainedModel) -> Replies:
        return self.questions.ask(model, entry.name, entry.seen) if self.questions is not None else Replies()

    def _judge(self, found: Evaluated, subject: Selection | PreTrainedModel, replies: Replies) -> None:
        """Figures and verdict over the held-out examples, where there are such."""
        if not self.benches:
            return
        found.forgotten = replies.forgotten
        total = sum(len(bench.held_out.examples) for bench in self.benches.values())
        with self.progress.phase(f"Judging {found.name}", total, "example") as advance:
            for name, bench in self.benches.items():
                sums, made = bench.sums(subject, advance), bench.answers(subject)
                found.sets[name] = bench.measured(sums, made)
                self.notes += [f"{found.name}, {bench.held_out.name}: {text}." for text in _complaints(found, name)]
                if name == TASK:
                    found.verdict = self._verdict(found, sums, made, replies)
                if name == TASK and self.options.by is not None:
                    found.classes = bench.by_group(sums)

    def _verdict(self, found: Evaluated, sums: TeacherForced, made: Generated | None, replies: Replies) -> Verdict:
        """The verdict over the examples that the model was not made from."""
        bench, generation = self.benches[TASK], self.options.generation
        seen = next(entry.seen for entry in self.candidates if entry.name == found.name)
        left_out = {i for i, record in enumerate(self.asked) if record in seen}
        theirs = bench.dense_answers
        return conclude(
            bench.held_out,
            bench.dense_sums,
            sums,
            (theirs, made) if theirs is not None and made is not None else None,
            by_answers=generation is not None and generation.answer_pattern is not None,
            calls=replies.calls,
            calling=self.questions.calling if self.questions is not None else (),
            left_out=left_out,
            max_drop=self.options.max_drop,
        )

    def _tasks(self, model: PreTrainedModel) -> dict[str, TaskResult]:
        """Results of the tasks on a live model; those that vLLM runs come later, when nothing else is loaded."""
        asked = self.options.tasks
        if asked is None or asked.engine == "vllm":
            return {}
        return run_tasks(
            model,
            self.tokenizer,
            asked,
            batch_size=self.tracing.answers.batch_size if self.tracing else 8,
            seed=self.options.seed,
            progress=self.progress,
        )

    def _run_vllm_tasks(self, models: list[Evaluated]) -> None:
        asked = self.options.tasks
        if asked is None or asked.engine != "vllm":
            return
        own_dtype = {} if self.dtype == "auto" else {"dtype": self.dtype}
        asked = replace(asked, engine_args={**own_dtype, **asked.engine_args})
        entries = {entry.name: entry for entry in self.candidates}
        for found in models:
            entry = entries.get(found.name)
            on_disk = entry.snapshot if entry is not None and entry.snapshot is not None else self.snapshot
            found.tasks = run_tasks_with_vllm(
                on_disk.path,
                asked,
                selection=entry.selection if entry is not None and found.kind == "mask" else None,
                seed=self.options.seed,
                progress=self.progress,
            )

    def _compare_tasks(self, models: list[Evaluated]) -> None:
        """Pair every model's tasks with the dense model's, item by item."""
        dense = models[0].tasks
        for found in models[1:]:
            found.task_changes = {}
            for name, result in found.tasks.items():
                try:
                    found.task_changes[name] = task_changes(result, dense[name], seed=self.options.seed)
                except UsageError as error:  # what was judged before is worth keeping
                    self.notes.append(f"{found.name} and the dense model cannot be compared: {error}")

    def _faithfulness(self, entry: Candidate, selection: Selection) -> Faithfulness:
        assert entry.trace is not None
        draws, facts = self.options.faithfulness, entry.trace.info.routing
        with self.progress.phase(f"Faithfulness of {entry.name}", draws + 2, "selection") as advance:
            return faithfulness(
                self.benches[TASK],
                selection,
                self.scores[entry.name],
                name=entry.name,
                draws=draws,
                groups=facts.groups if selection.routing == "reroute" else 1,
                seed=self.options.seed,
                advance=advance,
            )

    def _measure_footprints(self, models: list[Evaluated]) -> None:
        """Memory and speed, each model in a process of its own once nothing else is loaded."""
        workload = self.options.footprint
        if workload is None:
            return
        release_memory()
        paths = {self.snapshot.name: self.snapshot.path}
        paths |= {entry.name: entry.snapshot.path for entry in self.candidates if entry.snapshot is not None}
        with self.progress.phase("Measuring memory and speed", len(paths), "model") as advance:
            for found in models:
                if found.name in paths:
                    path = paths[found.name]
                    try:
                        found.footprint = measure_footprint(
                            path,
                            device=self.device,
                            dtype=self.dtype,
                            workload=workload,
                            trust_remote_code=self.snapshot.trust_remote_code,
                        )
                    except ShapeMoeError as error:  # what was judged before is worth keeping
                        self.notes.append(str(error))
                    advance(1)
