"""Trace a model over a calibration set: from files on disk to a trace on disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.fingerprint import UNVERIFIED, fingerprint, layout_fingerprint
from shape_moe.architectures.loading import load_model, load_tokenizer, unpacking
from shape_moe.architectures.sites import live_moe_config
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.batches import Batch, batches
from shape_moe.calibration.examples import Example, Tokeniser, TokenOptions
from shape_moe.calibration.records import DataOptions, Record, content_hash, load_records
from shape_moe.calibration.responses import fetch_answers, generate_answers, pad_token_id
from shape_moe.errors import DataError, ShapeMoeError, UsageError
from shape_moe.interrupts import DeferredInterrupt
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.canary import canary_tokens
from shape_moe.tracing.trace import Trace, TraceInfo, load_trace, merge_traces
from shape_moe.tracing.transformers_model import ModelTracer
from shape_moe.workspace import Workspace, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SAMPLES = 128
"""Records that are used when nothing else is said."""
_SAVE_SECONDS = 120.0
_PACKAGES = ("shape-moe", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class TraceOptions:
    """How a model is traced.

    Attributes:
        data: the calibration set.
        tokens: how its records become tokens.
        max_new_tokens: length of answers that the model gives to prompts without response; 0 gives none.
        responses_from: take those answers from this OpenAI-compatible endpoint instead.
        batch_size: examples per forward pass.
        max_tokens: stop adding examples once this many tokens are there.
        device: where to run.
        dtype: in which dtype, ``auto`` for the checkpoint's.
        skip_bad: leave records that fail out, and count them.
    """

    data: DataOptions
    tokens: TokenOptions = field(default_factory=TokenOptions)
    max_new_tokens: int = 512
    responses_from: str | None = None
    batch_size: int = 8
    max_tokens: int = 100_000
    device: str = "auto"
    dtype: str = "auto"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_tokens", 1), ("max_new_tokens", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}.")

    def job(self) -> dict[str, Any]:
        """What decides the trace, for the job file."""
        return asdict(self)


def as_trace_options(data: TraceOptions | DataOptions | str | PathLike[str], samples: int) -> TraceOptions:
    """Trace options from a file name or data options alone; ``samples`` is for the former."""
    if isinstance(data, TraceOptions):
        return data
    if isinstance(data, DataOptions):
        return TraceOptions(data)
    return TraceOptions(DataOptions(str(data), samples=samples))


@dataclass
class Calibration:
    """Examples ready to be traced, and where they come from."""

    examples: list[Example]
    source: dict[str, Any]


def trace(
    model: str | PathLike[str] | PreTrainedModel,
    data: TraceOptions | DataOptions | str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Trace:
    """Trace a model.

    Args:
        model: a folder, a hub id, or a live model (then ``tokenizer`` is needed, and the trace is unverified).
        data: the calibration set: a file (of which at most 128 records are used), or options that say more.
        out: folder for the trace; None keeps it in memory.
        tokenizer: the tokenizer of a live model.
        force: replace an existing ``out``.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong with the model, the data or the options; the message says what to do.
    """
    options = as_trace_options(data, DEFAULT_SAMPLES)
    session = TraceSession.open(model, options, tokenizer, progress)
    if out is None:
        return session.run(None)
    with Workspace(out, {"verb": "trace", "model": str(model), **options.job()}, force=force) as work:
        result = session.run(work.path)
        result.save(work.path)
        for leftover in [*work.path.glob("so-far*"), work.path / "answers.json"]:
            _remove(leftover)
        return load_trace(work.complete())


def merge(
    traces: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    force: bool = False,
) -> Trace:
    """Put traces of one model together and write the result.

    Raises:
        FingerprintError: when they are of different models.
        UsageError: when weights do not fit, or the output exists.
    """
    merged = merge_traces([load_trace(path) for path in traces], weights)
    job = {"verb": "merge", "traces": [str(path) for path in traces], "weights": list(weights or [])}
    with Workspace(out, job, force=force) as work:
        merged.save(work.path)
        return load_trace(work.complete())


class TraceSession:
    """One traced model; keeps it loaded, so that what follows (the canary) can use it."""

    def __init__(
        self,
        snapshot: Snapshot | None,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        options: TraceOptions,
        records: list[Record],
        progress: Progress,
    ) -> None:
        self.snapshot, self._model, self.options, self.progress = snapshot, model, options, progress
        self.records, self.skipped = records, dict[str, str]()
        context = (snapshot.config if snapshot else model.config.to_dict()).get("max_position_embeddings")  # type: ignore[union-attr]  # one of the two is there
        self.tokeniser = Tokeniser(tokenizer, context, options.tokens)
        self._check_records()

    @classmethod
    def open(
        cls,
        model: str | PathLike[str] | PreTrainedModel,
        options: TraceOptions,
        tokenizer: PreTrainedTokenizerBase | None,
        progress: Progress,
    ) -> TraceSession:
        """Check everything that can be checked before weights are loaded."""
        if isinstance(model, str | PathLike):
            snapshot = open_snapshot(model)
            _ = snapshot.moe_layers, unpacking(snapshot)
            records = load_records(options.data)
            return cls(snapshot, None, tokenizer or load_tokenizer(snapshot.path), options, records, progress)
        if tokenizer is None:
            raise UsageError("A live model needs its tokenizer: trace(model, options, tokenizer=...).")
        live_moe_config(model)
        return cls(None, model, tokenizer, options, load_records(options.data), progress)

    @property
    def model(self) -> PreTrainedModel:
        """The full model, loaded when it is first needed."""
        if self._model is None:
            assert self.snapshot is not None
            with self.progress.phase("Loading the model", 1, "model") as advance:
                self._model = load_model(self.snapshot, device=self.options.device, dtype=self.options.dtype)
                advance(1)
        return self._model

    def unload(self) -> None:
        """Let go of the model."""
        self._model = None

    def run(self, folder: Path | None) -> Trace:
        """Answer, tokenise and trace; intermediate results go to ``folder`` and are found there again."""
        calibration = self.calibrate(folder)
        tracer = ModelTracer(self.model)
        earlier, done = _load_so_far(folder)
        todo = list(batches(calibration.examples, self.options.batch_size, pad_token_id(self.model, self.tokeniser)))
        tokens = sum(len(e.tokens) for batch in todo[done:] for e in batch.examples)
        saved = time.monotonic()
        with self.progress.phase("Tracing", tokens, "token") as advance, tracer.attached(), DeferredInterrupt() as stop:
            for number, batch in enumerate(todo[done:], start=done + 1):
                self._trace_batch(tracer, batch)
                advance(sum(len(e.tokens) for e in batch.examples))
                due = stop.noted or time.monotonic() - saved > _SAVE_SECONDS
                if folder is not None and due and tracer.batches:
                    _save_so_far(folder, self._result(tracer, calibration, earlier), number)
                    saved = time.monotonic()
                stop.check()
        return self._result(tracer, calibration, earlier)

    def calibrate(self, folder: Path | None) -> Calibration:
        """Tokenise the records, with answers where they lack one."""
        options = self.options
        answers: dict[int, list[int]] = {}
        silent = [record for record in self.records if record.lacks_response]
        wanted = bool(silent) and options.max_new_tokens > 0
        if wanted and options.responses_from:
            with self.progress.phase("Fetching answers", len(silent), "answer") as advance:
                self.records = fetch_answers(
                    options.responses_from,
                    self.records,
                    max_new_tokens=options.max_new_tokens,
                    template=self.tokeniser.uses_template,
                    template_args=dict(options.tokens.template_args),
                    progress=advance,
                )
        elif wanted:
            answers = self._own_answers(silent, folder)
        examples: list[Example] = []
        tokens = 0
        for record in self.records:
            if tokens >= options.max_tokens:
                self.progress.note(
                    f"Stopped adding examples at {tokens:,} tokens ({len(examples)} of {len(self.records)} records); "
                    "--max-tokens raises the limit."
                )
                break
            example = self._attempt(record, answers.get(record.index))
            if example is not None:
                examples.append(example)
                tokens += len(example.tokens)
        if not examples:
            raise DataError(f"No record of {options.data.source} could be used.")
        return Calibration(examples, self._source(examples, len(silent)))

    def _own_answers(self, silent: list[Record], folder: Path | None) -> dict[int, list[int]]:
        file = folder / "answers.json" if folder is not None else None
        known: dict[int, list[int]] = {}
        if file is not None and file.is_file():
            known = {int(k): v for k, v in json.loads(file.read_text(encoding="utf-8")).items()}
        if len(known) == len(silent):
            return known
        model = self.model
        with self.progress.phase("Answering prompts", len(silent) - len(known), "answer") as advance:
            return generate_answers(
                model,
                self.tokeniser,
                silent,
                max_new_tokens=self.options.max_new_tokens,
                batch_size=self.options.batch_size,
                known=known,
                keep=(lambda answers: write_json(file, answers)) if file is not None else (lambda _: None),
                progress=advance,
            )

    def _check_records(self) -> None:
        """Tokenise what can be tokenised before weights are loaded, so that bad records show at once."""
        for record in self.records:
            self._attempt(record, [] if record.lacks_response else None)
        self.records = [record for record in self.records if record.where not in self.skipped]

    def _attempt(self, record: Record, answer: list[int] | None) -> Example | None:
        try:
            return self.tokeniser.example(record, answer)
        except DataError as error:
            if not self.options.skip_bad:
                raise
            self.skipped[record.where] = str(error)
            return None

    def _trace_batch(self, tracer: ModelTracer, batch: Batch) -> None:
        healthy = self._without_bad(tracer, batch) if self.options.skip_bad else batch
        if healthy is None:
            return
        try:
            tracer.add(healthy)
        except (ShapeMoeError, RuntimeError) as error:
            where = ", ".join(example.where for example in batch.examples)
            raise ShapeMoeError(f"Tracing failed in the batch of {where}: {_first_line(error)}") from error

    def _without_bad(self, tracer: ModelTracer, batch: Batch) -> Batch | None:
        """The batch without the examples whose forward pass fails, found by running them unrecorded first."""
        if tracer.failure(batch) is None:
            return batch
        good = []
        for row, example in enumerate(batch.examples):
            reason = tracer.failure(batch.rows([row]))
            if reason is None:
                good.append(row)
            else:
                self.skipped[example.where] = reason
        return batch.rows(good) if good else None

    def _result(self, tracer: ModelTracer, calibration: Calibration, earlier: Trace | None) -> Trace:
        info = self._info(tracer, calibration)
        traced = Trace(info, tracer.statistics(), tracer.coalitions()) if tracer.batches else None
        parts = [part for part in (earlier, traced) if part is not None]
        merged = merge_traces(parts) if len(parts) > 1 else parts[0]
        return replace(merged, info=info)

    def _info(self, tracer: ModelTracer, calibration: Calibration) -> TraceInfo:
        snapshot = self.snapshot
        examples = [example for example in calibration.examples if example.where not in self.skipped]
        prompt = sum(example.prompt_length for example in examples)
        total = sum(len(example.tokens) for example in examples)
        return TraceInfo(
            fingerprint=fingerprint(snapshot) if snapshot else UNVERIFIED,
            layout_fingerprint=layout_fingerprint(snapshot) if snapshot else UNVERIFIED,
            model=snapshot.name if snapshot else str(self.model.name_or_path or type(self.model).__name__),
            revision=snapshot.revision if snapshot else None,
            family=tracer.moe.family.model_type,
            num_experts=tracer.moe.num_experts,
            routing=tracer.moe.routing,
            layers=tracer.layers,
            tokens={"prompt": prompt, "response": total - prompt},
            examples=len(examples),
            implementation=tracer.implementation,
            dtype=tracer.dtype,
            source={**calibration.source, "skipped": dict(self.skipped)},
            versions={name: version(name) for name in _PACKAGES},
            canary=canary_tokens([example.tokens for example in examples]),
        )

    def _source(self, examples: Sequence[Example], silent: int) -> dict[str, Any]:
        options = self.options
        answered = "none"
        if silent and options.max_new_tokens:
            answered = options.responses_from or "the model"
        return {
            "data": options.data.source,
            "split": options.data.split,
            "subset": options.data.subset,
            "seed": options.data.seed,
            "samples": options.data.samples,
            "stratify": options.data.stratify,
            "content_hash": content_hash(self.records),
            "records": [example.index for example in examples],
            "truncated": sum(example.truncated for example in examples),
            "answers_missing": silent,
            "answers_from": answered,
            "max_new_tokens": options.max_new_tokens,
            "template": self.tokeniser.uses_template,
            "template_hash": self.tokeniser.template_hash,
            "template_args": dict(options.tokens.template_args),
            "max_length": options.tokens.max_length,
        }


def _load_so_far(folder: Path | None) -> tuple[Trace | None, int]:
    if folder is None or not (folder / "so-far.json").is_file():
        return None, 0
    done = int(json.loads((folder / "so-far.json").read_text(encoding="utf-8"))["batches"])
    kept = load_trace(folder / f"so-far-{done}")
    return kept, done


def _save_so_far(folder: Path, kept: Trace, done: int) -> None:
    """Save an unfinished trace; ``so-far.json`` names the folder that is complete."""
    kept.save(folder / f"so-far-{done}")
    write_json(folder / "so-far.json", {"batches": done})
    for old in folder.glob("so-far-*"):
        if old.name != f"so-far-{done}":
            shutil.rmtree(old)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
