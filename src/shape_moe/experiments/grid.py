"""An experiment on its way: model by model, evaluation by evaluation, cell by cell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.loading import load_tokenizer, release_memory
from shape_moe.architectures.sizes import measure
from shape_moe.calibration.records import Record
from shape_moe.errors import BudgetError
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.generation import Asked
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.experiments.config import (
    CalibrationSpec,
    EvaluationSpec,
    ExamplesSpec,
    ExperimentConfig,
    ModelSpec,
    SeededMethod,
)
from shape_moe.experiments.engine_answers import EngineAnswers
from shape_moe.experiments.evaluations import JudgedTask, OpenEvaluation
from shape_moe.experiments.plan import Plan, on_device
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.session import ExampleOptions, ModelSession, load_original
from shape_moe.jobs.trace import kept_trace
from shape_moe.journal import Journal
from shape_moe.made_with import made_with
from shape_moe.progress import Progress
from shape_moe.reporting.published_figures import published_rows
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.selection.selection import Selection
from shape_moe.serving.vllm.masked_engine import MaskedEngine
from shape_moe.units import counted, readable_duration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
CELLS_FILE = "cells.jsonl"
ANSWERS_FOLDER = "answers"
"""Where answers of dense models to prompts without a response are kept while an experiment is unfinished."""
_DENSE = "dense"
Document = dict[str, Any]


@dataclass
class _Cell:
    """A selection of the grid and what evaluations say of it; without one, the reason why there is none."""

    calibration: str
    method: SeededMethod
    keep: float
    selection: Selection | None = None
    reason: str | None = None
    file: str | None = None
    sets: dict[str, Document] = field(default_factory=dict)


class Grid:
    """Runs a plan.

    Args:
        plan: the grid and what it reads.
        digest: of what decides the results, as the folder's own description says it.
        folder: where traces, selections and finished cells are kept.
        progress: where to show progress.
    """

    def __init__(self, plan: Plan, digest: str, folder: Path, progress: Progress) -> None:
        self.plan, self.digest, self.folder, self.progress = plan, digest, folder, progress
        self.known: Journal[Document] = Journal(folder / CELLS_FILE, "cell", "figures")
        self.clock = _Clock(plan.config.cells, progress)
        if done := sum(place[-1] != _DENSE for place in self.known):
            progress.note(f"{counted(done, 'judged selection')} already done by the interrupted run.")

    def run(self) -> Document:
        """Judge every cell that is not known yet, and put the document together."""
        parts = [_ModelRun(self, spec).run() for spec in self.plan.config.models]
        return self._document(parts)

    def _document(self, parts: list[Document]) -> Document:
        config, hashes = self.plan.config, self.plan.hashes
        document = {
            "format_version": FORMAT_VERSION,
            "verb": "experiment",
            "config": config.echo(),
            "config_hash": self.digest,
            "models": [part["model"] for part in parts],
            "calibration": [
                {
                    "name": spec.name,
                    "data": spec.tracing.data.source,
                    "split": spec.tracing.data.split,
                    "examples": len(self.plan.calibration[spec.name]),
                    "content_hash": hashes["calibration"][spec.name],
                }
                for spec in config.calibration
            ],
            "evaluation": [self._evaluation(spec) for spec in config.evaluation],
            "dense": [part["dense"] for part in parts],
            "cells": [cell for part in parts for cell in part["cells"]],
            **made_with(config.seed),
        }
        published = published_rows(document)
        return {**document, "published": published} if published else document

    def _evaluation(self, spec: EvaluationSpec) -> Document:
        common: Document = {"name": spec.name, "metrics": list(spec.metrics), "calibration": list(spec.calibration)}
        if spec.published is not None:
            common["published"] = asdict(spec.published)
        if not isinstance(spec, ExamplesSpec):
            options = {"limit": spec.limit, "fewshot": spec.fewshot, "chat_template": spec.chat_template}
            return {**common, "kind": "task", "task": spec.task, **options}
        return {
            **common,
            "kind": "examples",
            "data": spec.tracing.data.source,
            "split": spec.tracing.data.split,
            "records": len(self.plan.held_out[spec.name]),
            "content_hash": self.plan.hashes["held_out"][spec.name],
            "sentence": self.plan.sentence(spec.name),
        }


class _ModelRun:
    """All cells of one model, which is loaded when something is left to trace or to judge, and once."""

    def __init__(self, grid: Grid, spec: ModelSpec) -> None:
        self.spec, self.plan, self.progress = spec, grid.plan, grid.progress
        self.known, self.clock, self.folder = grid.known, grid.clock, grid.folder
        self.config: ExperimentConfig = grid.plan.config
        self.snapshot = grid.plan.snapshots[spec.name]
        self.tokenizer = load_tokenizer(self.snapshot.path, trust_remote_code=self.snapshot.trust_remote_code)
        self.size = measure(self.snapshot)
        self.dense: dict[str, Document] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The dense model."""
        return load_original(self.snapshot, self.spec.device, self.spec.dtype, self.progress)

    def run(self) -> Document:
        """Trace, select and judge; the model is let go of at the end."""
        cells = [cell for spec in self.config.calibration for cell in self._selected(spec)]
        try:
            for evaluation in self.config.evaluation:
                self._evaluate(evaluation, cells)
        finally:
            if "engine" in self.__dict__:
                self.engine.close()
        self._release()
        return self._document(cells)

    def _release(self) -> None:
        self.__dict__.pop("model", None)
        release_memory()

    @cached_property
    def held_out_sets(self) -> dict[str, HeldOutSet]:
        """The examples of every evaluation, with answers of the dense model where they lack one."""
        return {spec.name: self._held_out(spec) for spec in self.config.evaluation if isinstance(spec, ExamplesSpec)}

    @cached_property
    def engine(self) -> MaskedEngine:
        """The dense model in a vLLM engine; it takes the place of the one in Transformers."""
        specs = [spec for spec in self.config.evaluation if isinstance(spec, ExamplesSpec) and spec.generation]
        asked = [Asked.of(self.held_out_sets[spec.name], spec.generation) for spec in specs]
        longest = max(max(map(len, part.prompts.values())) + part.limit for part in asked)
        self._release()
        with self.progress.phase("Starting vLLM", 1, "engine") as advance:
            engine = MaskedEngine(self.snapshot, longest, self.spec.dtype, self.config.engine_args)
            advance(1)
        return engine

    def _session(self, tracing: ExampleOptions, records: list[Record]) -> ModelSession:
        options = on_device(tracing, self.spec)
        return ModelSession(self.snapshot, self.model, self.tokenizer, options, self.progress, records)

    def _selected(self, spec: CalibrationSpec) -> list[_Cell]:
        """Every selection from one calibration task."""
        folder = self.folder / "traces" / self.spec.name / spec.name
        trace = kept_trace(lambda: self._session(spec.tracing, self.plan.calibration[spec.name]), folder)
        runs = [(method, self.config.scoring(method)) for method in self.config.methods]
        selectors = {seed: TraceSelector(trace, scoring) for seed, scoring in {s.seed: s for _, s in runs}.items()}
        cells = []
        for method, scoring in runs:
            selector = selectors[scoring.seed]
            for routing in self.config.routings:
                routed = method.routed_by(routing)
                cells += [self._cell(selector, spec.name, routed, keep) for keep in self.config.keep]
        return cells

    def _cell(self, selector: TraceSelector, calibration: str, method: SeededMethod, keep: float) -> _Cell:
        cell = _Cell(calibration, method, keep)
        try:
            cell.selection = selector.select(SelectOptions(keep, method))
        except BudgetError as error:
            cell.reason = f"{self.spec.name}, {method}, keep {keep:g}: {error}"
            return cell
        seed = "" if method.seed is None else f"-seed{method.seed}"
        routed = method.routed.replace(", ", "-")
        name = f"{method.scorer}-{method.rule}-{routed}-{keep:g}{seed}.json"
        cell.file = f"selections/{self.spec.name}/{calibration}/{name}"
        (self.folder / cell.file).parent.mkdir(parents=True, exist_ok=True)
        cell.selection.save(self.folder / cell.file)
        return cell

    def _evaluate(self, spec: EvaluationSpec, cells: list[_Cell]) -> None:
        """Judge by one evaluation what is not known yet; equal selections are judged once."""
        judged = [cell for cell in cells if cell.calibration in spec.calibration]
        wanted = {cell.selection.digest: cell.selection for cell in judged if cell.selection is not None}
        place = (self.spec.name, spec.name)
        missing = {digest: entry for digest, entry in wanted.items() if (*place, digest) not in self.known}
        if missing or (*place, _DENSE) not in self.known:
            self._judge(spec, missing)
        dense = self.known[*place, _DENSE]
        self.dense[spec.name] = {key: value for key, value in dense.items() if key != "results"}
        for cell in judged:
            if cell.selection is not None:
                cell.sets[spec.name] = self.known[*place, cell.selection.digest]
        self.clock.done(len(judged), len(missing))

    def _judge(self, spec: EvaluationSpec, missing: dict[str, Selection]) -> None:
        opened = self._open(spec)
        try:
            if (self.spec.name, spec.name, _DENSE) not in self.known:
                self.known.put((self.spec.name, spec.name, _DENSE), opened.dense_document())
            title = f"{self.spec.name}: judging by {spec.name}"
            with self.progress.phase(title, len(missing), "cell") as advance, self.clock.running():
                for digest, selection in missing.items():
                    self.known.put((self.spec.name, spec.name, digest), opened.document(selection))
                    advance(1)
        finally:
            opened.close()

    def _open(self, spec: EvaluationSpec) -> OpenEvaluation:
        if not isinstance(spec, ExamplesSpec):
            known = self.known.get((self.spec.name, spec.name, _DENSE))
            return JudgedTask(spec, self.model, self.tokenizer, self.config.seed, known)
        if self.config.engine == "vllm":
            assert spec.generation is not None
            held_out = self.held_out_sets[spec.name]
            return EngineAnswers(self.engine, self.tokenizer, held_out, spec.generation, self.config.seed)
        return Bench(
            self.model,
            self.tokenizer,
            self._held_out(spec),
            generation=spec.generation,
            seed=self.config.seed,
            progress=self.progress,
        )

    def _held_out(self, spec: ExamplesSpec) -> HeldOutSet:
        folder = self.folder / ANSWERS_FOLDER / self.spec.name / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        session = self._session(spec.tracing, self.plan.held_out[spec.name])
        return held_out_set(session, session.calibrator, f"evaluation {spec.name}", folder)

    def _document(self, cells: list[_Cell]) -> Document:
        facts = {
            "name": self.spec.name,
            "model": self.snapshot.name,
            "revision": self.snapshot.revision,
            "fingerprint": fingerprint(self.snapshot),
            "dtype": self.spec.dtype,
            "device": self.spec.device,
        }
        dense = {"model": self.spec.name, "bytes": self.snapshot.total_bytes, "sets": self.dense}
        return {"model": facts, "dense": dense, "cells": [self._cell_document(cell) for cell in cells]}

    def _cell_document(self, cell: _Cell) -> Document:
        chosen = cell.selection
        return {
            "model": self.spec.name,
            "calibration": cell.calibration,
            "scorer": cell.method.scorer,
            "rule": cell.method.rule,
            "seed": cell.method.seed,
            "routing": cell.method.routed,
            "keep_asked": cell.keep,
            "keep": chosen.keep if chosen else None,
            "kept": chosen.kept if chosen else None,
            "bytes": round(self.size.at_keep(chosen.kept)) if chosen else None,
            "stability": chosen.stability if chosen else None,
            "selection": cell.file,
            "reason": cell.reason,
            "sets": cell.sets,
        }


class _Clock:
    """Tells how much of the grid is done, and how long the rest may take.

    Args:
        total: cells of the grid.
        progress: where to tell it.
    """

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self.progress = total, progress
        self.finished, self.judged, self.seconds = 0, 0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time that judging takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began

    def done(self, cells: int, judged: int) -> None:
        """Some more cells are done, of which this run judged some."""
        self.finished, self.judged = self.finished + cells, self.judged + judged
        left = self.total - self.finished
        if not left:
            return
        rest = ""
        if self.judged:
            rest = f"; the rest takes about {readable_duration(left * self.seconds / self.judged)}"
        self.progress.note(f"{self.finished} of {self.total} cells are done{rest}")
