"""One evaluation on its way: the dense model first, masks on it, then every checkpoint by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.loading import load_model, load_tokenizer, release_memory
from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions, Record
from shape_moe.errors import UsageError
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.comparison import Comparison
from shape_moe.evaluation.conclusion import conclude
from shape_moe.evaluation.evaluated import ALSO, TASK, Evaluated, Evaluation
from shape_moe.evaluation.faithfulness import Faithfulness, faithfulness
from shape_moe.evaluation.forgotten import general_records
from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.harness import check_chat_template, run_tasks
from shape_moe.evaluation.questions import Questions, Replies
from shape_moe.evaluation.subjects import Candidate, scores_of
from shape_moe.evaluation.task_results import TaskResult
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.verdict import Verdict
from shape_moe.jobs.evaluate_by_layers import LIKELIHOOD_ALONE, NeedsWholeModel, layered_benches
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.evaluation_footprints import measure_footprints
from shape_moe.jobs.evaluation_tasks import compare_tasks, tasks_in_vllm
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.judging_plan import JudgingPlan, plan_judging
from shape_moe.jobs.session import ExampleOptions, ModelSession, load_original
from shape_moe.made_with import MadeWith
from shape_moe.progress import Progress
from shape_moe.pruning.masks import masked
from shape_moe.scoring.scores import Scores
from shape_moe.selection.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _complaints(found: Evaluated, name: str) -> tuple[str, ...]:
    health = found.sets[name].health
    return health.complaints if health is not None else ()


class EvaluationRun:
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
                    f"{seen} of {len(records)} examples of {data.name} were used to make {entry.name}: its "
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
        if tasks is not None and tasks.engine == "vllm":
            seed = self.options.seed
            tasks_in_vllm(
                models, self.snapshot, self.candidates, tasks, dtype=self.dtype, seed=seed, progress=self.progress
            )
        self.notes += compare_tasks(models, seed=self.options.seed)
        if self.options.footprint is not None:
            where = {"device": self.device, "dtype": self.dtype}
            self.notes += measure_footprints(
                models, self.snapshot, self.candidates, self.options.footprint, **where, progress=self.progress
            )
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
