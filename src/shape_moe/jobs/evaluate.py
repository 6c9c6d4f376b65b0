"""Evaluate pruned checkpoints and selections beside the dense model."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.fingerprint import check_fingerprint, fingerprint
from shape_moe.architectures.loading import load_model
from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.records import DataOptions, load_records
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.evaluation.faithfulness import Faithfulness, faithfulness
from shape_moe.evaluation.figures import worst_group
from shape_moe.evaluation.footprint import Footprint, Workload, measure_footprint
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.judge import Judge, Verdict
from shape_moe.jobs.held_out import held_out_set, known_prompts, overlap
from shape_moe.jobs.options import TraceOptions, as_trace_options
from shape_moe.jobs.session import TraceSession
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.masks import masked
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.selection.selection import Selection, load_selection
from shape_moe.tracing.trace import SegmentWeights, Trace, load_trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
EVALUATION_SAMPLES = 200
TASK, ALSO = "task", "also"
_PACKAGES = ("shape-moe", "torch", "transformers")


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured.

    Attributes:
        also: further examples, of what the pruned model was not made for.
        by: field of the records whose classes are judged one by one.
        generation: how models answer freely, None for not at all.
        footprint: what to time, None to leave memory and speed out.
        faithfulness: how many random selections every selection is compared with, 0 for none.
        trace: trace of selections given as files, and of checkpoints that hold none; faithfulness needs one.
        seed: draws samples, resamples and random selections.
    """

    also: DataOptions | None = None
    by: str | None = None
    generation: GenerationOptions | None = field(default_factory=GenerationOptions)
    footprint: Workload | None = field(default_factory=Workload)
    faithfulness: int = 0
    trace: str | None = None
    seed: int = 0


@dataclass
class Evaluated:
    """Everything that was found out about one model.

    Attributes:
        name: what the user called it.
        kind: ``dense``, ``mask`` (a selection on the dense model) or ``checkpoint``.
        selection: what it keeps, None for the dense model and for checkpoints of other tools.
        size: bytes of its weights; of a mask, what its checkpoint would have.
        sets: verdicts by set, ``task`` and perhaps ``also``.
        footprint: memory and speed, None where they were not measured (a mask has the dense model's).
    """

    name: str
    kind: str
    selection: Selection | None
    size: int
    sets: dict[str, Verdict] = field(default_factory=dict)
    footprint: Footprint | None = None

    def to_document(self, by: str | None) -> dict[str, Any]:
        """For JSON."""
        chosen = self.selection
        keys = ("scorer", "rule", "routing", "keep")
        groups = self.sets[TASK].groups
        return {
            "name": self.name,
            "kind": self.kind,
            "selection": {key: getattr(chosen, key) for key in keys} if chosen else None,
            "bytes": self.size,
            "sets": {name: verdict.to_document() for name, verdict in self.sets.items()},
            "classes": _classes(by, groups) if by and groups else None,
            "footprint": self.footprint.to_document() if self.footprint else None,
        }


def _classes(by: str, groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from shape_moe.evaluation.figures import document

    found = {name: {key: document(entry) for key, entry in group.items()} for name, group in groups.items()}
    return {"field": by, "worst": worst_group(groups), "by": found}


@dataclass(frozen=True)
class Evaluation:
    """The result: models in the order given, the dense one first.

    Attributes:
        models: the models.
        faithfulness: one entry per selection, empty where it was not asked for.
        document: what the JSON file holds.
        notes: what the user should know.
    """

    models: tuple[Evaluated, ...]
    faithfulness: tuple[Faithfulness, ...]
    document: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    name: str
    snapshot: Snapshot | None
    selection: Selection | None
    trace: Trace | None


def evaluate(
    model: str | PathLike[str],
    candidates: Sequence[str | PathLike[str] | Selection] = (),
    *,
    data: TraceOptions | DataOptions | str | PathLike[str],
    options: EvaluateOptions | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Judge the dense model, and pruned ones beside it.

    Args:
        model: the dense model, a folder or hub id.
        candidates: folders of checkpoints, selection files or selections; the latter two are judged as masks on the
            dense model, and nothing is written.
        data: held-out examples: a file (of which at most 200 records are used), or options that say more.
        options: see :class:`EvaluateOptions`.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do.
    """
    options = options or EvaluateOptions()
    tracing = as_trace_options(data, EVALUATION_SAMPLES)
    if options.by is not None:
        tracing = replace(tracing, data=replace(tracing.data, stratify=options.by))
    snapshot = open_snapshot(model)
    known = [_candidate(entry, snapshot, options) for entry in candidates]
    names = [entry.name for entry in known]
    if len(set(names)) < len(names):
        raise UsageError("Two of the models to evaluate have the same name; rename one, or leave it out.")
    run = _Run(snapshot, known, tracing, options, progress)
    return run.carry_out()


def _candidate(given: str | PathLike[str] | Selection, dense: Snapshot, options: EvaluateOptions) -> _Candidate:
    """Look at what is to be judged, before any weight is loaded.

    Raises:
        FingerprintError: when it was made from another model.
        CheckpointError: when it cannot be read.
    """
    if isinstance(given, Selection):
        return _mask(f"{given.scorer}/{given.rule} {given.keep:.2f}", given, dense, options)
    path = Path(given)
    if path.is_file():
        return _mask(path.stem if path.stem != "selection" else path.parent.name, load_selection(path), dense, options)
    snapshot = open_snapshot(given)
    if snapshot.config.get("vocab_size") != dense.config.get("vocab_size"):
        raise CheckpointError(f"{given} has another vocabulary than {dense.name}, so the two cannot be compared.")
    folder = Path(snapshot.path) / "shape"
    selection = load_selection(folder / "selection.json") if (folder / "selection.json").is_file() else None
    if selection is not None and selection.fingerprint is not None:
        check_fingerprint(selection.fingerprint, fingerprint(dense), f"The checkpoint {given}", force=True)
    trace = load_trace(folder / "trace") if (folder / "trace").is_dir() else _given_trace(options)
    return _Candidate(path.resolve().name, snapshot, selection, trace)


def _mask(name: str, selection: Selection, dense: Snapshot, options: EvaluateOptions) -> _Candidate:
    if selection.fingerprint is not None:
        check_fingerprint(selection.fingerprint, fingerprint(dense), f"The selection {name}", force=True)
    return _Candidate(name, None, selection, _given_trace(options))


def _given_trace(options: EvaluateOptions) -> Trace | None:
    return load_trace(options.trace) if options.trace is not None else None


def scores_of(selection: Selection, trace: Trace) -> Scores:
    """The values that a selection was made from."""
    weights = SegmentWeights(selection.options.get("prompt", 1.0), selection.options.get("response", 1.0))
    return score_trace(trace, selection.scorer, ScoreOptions(weights, int(selection.options.get("seed", 0))))


class _Run:
    """One evaluation on its way: the dense model first, masks on it, then every checkpoint by itself."""

    def __init__(
        self,
        snapshot: Snapshot,
        candidates: list[_Candidate],
        tracing: TraceOptions,
        options: EvaluateOptions,
        progress: Progress,
    ) -> None:
        self.snapshot, self.candidates, self.tracing = snapshot, candidates, tracing
        self.options, self.progress = options, progress
        self.notes: list[str] = []
        self.records = load_records(tracing.data)
        self._check_faithfulness()
        self._warn_of_overlap()
        self.session = TraceSession.open(snapshot, tracing, None, progress, self.records)
        self.size = measure(snapshot)

    def _check_faithfulness(self) -> None:
        for entry in self.candidates if self.options.faithfulness else ():
            if entry.selection is not None and entry.trace is None:
                raise UsageError(f"--faithfulness needs the trace that {entry.name} was made from: give --trace TRACE.")

    def _warn_of_overlap(self) -> None:
        for entry in self.candidates:
            seen = overlap(self.records, known_prompts(entry.trace)) if entry.trace else 0
            if seen:
                self.notes.append(
                    f"{seen} of {len(self.records)} examples of {self.tracing.data.source} were used to calibrate "
                    f"{entry.name}: its figures look better than they are. Give examples that it has not seen."
                )

    def carry_out(self) -> Evaluation:
        """Judge everything."""
        judges = self._judges()
        model: PreTrainedModel = self.session.model
        models = [self._dense(model, judges)]
        checks = []
        for entry in self.candidates:
            if entry.snapshot is None:
                models.append(self._masked(entry, model, judges))
            if self.options.faithfulness and entry.selection is not None:
                checks.append(self._faithfulness(entry, model, judges[TASK]))
        del model
        self.session.unload()
        models += [self._checkpoint(entry, entry.snapshot, judges) for entry in self.candidates if entry.snapshot]
        for judge in judges.values():
            judge.close()
        self._measure_footprints(models)
        order = {name: i for i, name in enumerate([self.snapshot.name, *(entry.name for entry in self.candidates)])}
        models.sort(key=lambda found: order[found.name])
        return Evaluation(tuple(models), tuple(checks), self._document(models, checks), tuple(self.notes))

    def _judges(self) -> dict[str, Judge]:
        sources = {TASK: (self.records, self.tracing.data)}
        if self.options.also is not None:
            sources[ALSO] = (load_records(self.options.also), self.options.also)
        judges = {}
        for name, (records, data) in sources.items():
            held_out = held_out_set(self.session, records, data, data.source)
            with self.progress.phase(f"Dense model on {data.source}", len(held_out.examples), "example") as advance:
                judges[name] = Judge(
                    self.session.model,
                    self.session.tokenizer,
                    held_out,
                    generation=self.options.generation,
                    seed=self.options.seed,
                    advance=advance,
                )
                judges[name].answer_as_dense(self.session.model)
        return judges

    def _dense(self, model: PreTrainedModel, judges: dict[str, Judge]) -> Evaluated:
        del model
        sets = {name: judge.dense_verdict() for name, judge in judges.items()}
        return Evaluated(self.snapshot.name, "dense", None, self.snapshot.total_bytes, sets)

    def _masked(self, entry: _Candidate, model: PreTrainedModel, judges: dict[str, Judge]) -> Evaluated:
        assert entry.selection is not None
        with masked(model, entry.selection):
            sets = self._judged(entry.name, model, judges)
        return Evaluated(entry.name, "mask", entry.selection, round(self.size.at_keep(entry.selection.kept)), sets)

    def _checkpoint(self, entry: _Candidate, snapshot: Snapshot, judges: dict[str, Judge]) -> Evaluated:
        gc.collect()
        with self.progress.phase(f"Loading {entry.name}", 1, "model") as advance:
            model = load_model(snapshot, device=self.tracing.device, dtype=self.tracing.dtype)
            advance(1)
        sets = self._judged(entry.name, model, judges)
        return Evaluated(entry.name, "checkpoint", entry.selection, snapshot.total_bytes, sets)

    def _judged(self, name: str, model: PreTrainedModel, judges: dict[str, Judge]) -> dict[str, Verdict]:
        total = sum(len(judge.held_out.examples) for judge in judges.values())
        sets = {}
        with self.progress.phase(f"Judging {name}", total, "example") as advance:
            for key, judge in judges.items():
                sets[key] = judge.verdict(judge.compare(model, advance), judge.answer(model))
        return sets

    def _faithfulness(self, entry: _Candidate, model: PreTrainedModel, judge: Judge) -> Faithfulness:
        assert entry.selection is not None
        assert entry.trace is not None
        draws = self.options.faithfulness
        with self.progress.phase(f"Faithfulness of {entry.name}", draws + 2, "selection") as advance:
            return faithfulness(
                model,
                judge,
                entry.selection,
                scores_of(entry.selection, entry.trace),
                name=entry.name,
                draws=draws,
                seed=self.options.seed,
                advance=advance,
            )

    def _measure_footprints(self, models: list[Evaluated]) -> None:
        """Memory and speed, each model in a process of its own once nothing else is loaded."""
        if self.options.footprint is None:
            return
        gc.collect()
        paths = {self.snapshot.name: self.snapshot.path}
        paths |= {entry.name: entry.snapshot.path for entry in self.candidates if entry.snapshot is not None}
        with self.progress.phase("Measuring memory and speed", len(paths), "model") as advance:
            for found in models:
                if found.name in paths:
                    found.footprint = measure_footprint(
                        paths[found.name],
                        device=self.tracing.device,
                        dtype=self.tracing.dtype,
                        workload=self.options.footprint,
                    )
                    advance(1)

    def _document(self, models: list[Evaluated], checks: list[Faithfulness]) -> dict[str, Any]:
        also = self.options.also
        return {
            "format_version": FORMAT_VERSION,
            "verb": "evaluate",
            "model": self.snapshot.name,
            "fingerprint": fingerprint(self.snapshot),
            "data": self.tracing.data.source,
            "also": also.source if also else None,
            "examples": len(self.records),
            "seed": self.options.seed,
            "versions": {name: version(name) for name in _PACKAGES},
            "command": " ".join(["shape-moe", *sys.argv[1:]]),
            "models": [found.to_document(self.options.by) for found in models],
            "faithfulness": [check.to_document() for check in checks],
            "warnings": self.notes,
        }
