"""One traced model: loaded when it is first needed, and kept for what follows (the canary)."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from shape_moe.architectures.fingerprint import UNVERIFIED, Origin, fingerprint, layout_fingerprint, origin
from shape_moe.architectures.loading import free_memory, load_model, load_tokenizer, unpacking
from shape_moe.architectures.moe_config import MoeConfig
from shape_moe.architectures.sites import live_moe_config
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.batches import Batch, batches
from shape_moe.calibration.example_maker import Answerer, AnswerOptions, ExampleMaker
from shape_moe.calibration.examples import Tokeniser, TokenOptions
from shape_moe.calibration.records import DataOptions, Record, load_records
from shape_moe.calibration.responses import generate_answers, pad_token_id
from shape_moe.engines import check_engine
from shape_moe.errors import DataError, ShapeMoeError, UsageError, first_line
from shape_moe.interrupts import DeferredInterrupt
from shape_moe.made_with import versions
from shape_moe.progress import Progress
from shape_moe.traced_files import traced_files
from shape_moe.tracing.trace import Trace, TraceInfo, load_trace, merge_traces
from shape_moe.workspace import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from shape_moe.tracing.transformers_model import ModelTracer

DEFAULT_SAMPLES = 128
"""Records that are used when nothing else is said."""
_SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class ExampleOptions:
    """Examples for a model, and how it runs over them: to be traced, or to judge by.

    Attributes:
        data: the records.
        tokens: how its records become tokens.
        answers: what happens to prompts without a response; batch size and limits.
        device: where to run.
        dtype: in which dtype, ``auto`` for the checkpoint's.
        engine: ``transformers`` (every statistic) or ``vllm`` (coalitions and counts; for models of several GPUs).
        engine_args: further arguments of ``vllm.LLM``, such as ``tensor_parallel_size``.

    Raises:
        UsageError: for an unknown engine, and for arguments of one that takes none.
    """

    data: DataOptions
    tokens: TokenOptions = field(default_factory=TokenOptions)
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    device: str = "auto"
    dtype: str = "auto"
    engine: str = "transformers"
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_engine(self.engine, self.engine_args)

    def job(self) -> dict[str, Any]:
        """What decides the trace, for the job file."""
        return asdict(self)


def as_example_options(data: ExampleOptions | DataOptions | str | PathLike[str], samples: int) -> ExampleOptions:
    """Example options from a file name or data options alone; ``samples`` is for the former."""
    if isinstance(data, ExampleOptions):
        return data
    if isinstance(data, DataOptions):
        return ExampleOptions(data)
    return ExampleOptions(DataOptions(str(data), samples=samples))


class ModelSession:
    """Traces one model over one calibration set.

    Args:
        snapshot: the model on disk, None for a live model of unknown origin.
        model: the live model, None to load it from the snapshot.
        tokenizer: its tokenizer.
        options: how to trace.
        progress: where to show progress.
        records: the calibration records, None to load those that the options name.

    Attributes:
        source_notes: what a trace says of its source beside what its records say.
    """

    def __init__(
        self,
        snapshot: Snapshot | None,
        model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        options: ExampleOptions,
        progress: Progress,
        records: list[Record] | None = None,
    ) -> None:
        self.snapshot, self._model, self.options, self.progress = snapshot, model, options, progress
        config = snapshot.config if snapshot else model.config.to_dict()  # type: ignore[union-attr]  # one is there
        tokeniser = Tokeniser(tokenizer, config.get("max_position_embeddings"), options.tokens)
        self.tokenizer = tokenizer
        self.source_notes: dict[str, str] = {}
        records = load_records(options.data) if records is None else records
        self._files = traced_files(snapshot.path) if snapshot else None
        self.calibrator = ExampleMaker(records, tokeniser, options.data, options.answers, progress)

    @classmethod
    def open(
        cls,
        model: str | PathLike[str] | PreTrainedModel | Snapshot,
        options: ExampleOptions,
        tokenizer: PreTrainedTokenizerBase | None,
        progress: Progress,
        records: list[Record] | None = None,
    ) -> ModelSession:
        """Check everything that can be checked before weights are loaded.

        Raises:
            ShapeMoeError: when the model, its tokenizer or the data cannot be used.
        """
        free_memory(options.device)
        if isinstance(model, str | PathLike):
            model = open_snapshot(model)
        if isinstance(model, Snapshot):
            _ = model.moe_layers, unpacking(model)
            return cls(
                model,
                None,
                tokenizer or load_tokenizer(model.path, trust_remote_code=model.trust_remote_code),
                options,
                progress,
                records,
            )
        if tokenizer is None:
            raise UsageError("A live model needs its tokenizer: trace(model, data, tokenizer=...).")
        live_moe_config(model)
        return cls(None, model, tokenizer, options, progress, records)

    def calibrator_of(self, records: list[Record], data: DataOptions) -> ExampleMaker:
        """Other records, tokenised and answered as those of the session are.

        Raises:
            DataError: for a record that cannot be used, unless such are skipped.
        """
        return ExampleMaker(records, self.calibrator.tokeniser, data, self.options.answers, self.progress)

    def job(self) -> dict[str, Any]:
        """What decides the trace: the model and the records by their content, and the options."""
        model = fingerprint(self.snapshot) if self.snapshot else f"live {uuid4()}"  # a live model never resumes
        layout = layout_fingerprint(self.snapshot) if self.snapshot else UNVERIFIED
        return {"model": model, "layout": layout, "records": self.calibrator.content_hash, **self.options.job()}

    @property
    def model(self) -> PreTrainedModel:
        """The full model, loaded when it is first needed."""
        if self._model is None:
            assert self.snapshot is not None
            self._model = load_original(self.snapshot, self.options.device, self.options.dtype, self.progress)
        return self._model

    def use(self, model: PreTrainedModel) -> None:
        """Take a model that is loaded already instead of loading the snapshot."""
        self._model = model

    def unload(self) -> None:
        """Let go of the model."""
        self._model = None

    def run(self, folder: Path | None) -> Trace:
        """Answer, tokenise and trace; intermediate results go to ``folder`` and are found there again.

        Raises:
            UsageError: when another engine was asked for: only ``shape-moe trace`` hands over to one.
            ShapeMoeError: when a batch cannot be traced; the message names the record.
            DataError: when no record could be traced.
        """
        if self.options.engine != "transformers":
            raise UsageError(
                f"Only a trace by itself is made with {self.options.engine}: make it with `shape-moe trace --engine "
                f"{self.options.engine}`, and start from it (--trace)."
            )
        from shape_moe.tracing.transformers_model import ModelTracer

        examples = self.calibrator.run(self.answerer, folder)
        tracer = ModelTracer(self.model)
        earlier, done = self._load_so_far(folder)
        pad_id = pad_token_id(self.model, self.calibrator.tokeniser)
        todo = list(batches(examples, self.options.answers.batch_size, pad_id))[done:]
        tokens = sum(len(example.tokens) for batch in todo for example in batch.examples)
        saved = time.monotonic()
        with self.progress.phase("Tracing", tokens, "token") as advance, tracer.attached(), self._stop() as stop:
            for number, batch in enumerate(todo, start=done + 1):
                self._trace_batch(tracer, batch)
                advance(sum(len(example.tokens) for example in batch.examples))
                due = stop.noted or time.monotonic() - saved > _SAVE_SECONDS
                if folder is not None and due and (tracer.batches or earlier):
                    _save_so_far(folder, self._result(tracer, earlier), number)
                    saved = time.monotonic()
                stop.check()
        return self._result(tracer, earlier)

    def answerer(self) -> Answerer:
        """What lets the model answer prompts."""
        return partial(generate_answers, self.model, batch_size=self.options.answers.batch_size)

    def _stop(self) -> DeferredInterrupt:
        return DeferredInterrupt(
            lambda: self.progress.note("Stopping after this batch; press Ctrl-C again to stop at once.")
        )

    def _trace_batch(self, tracer: ModelTracer, batch: Batch) -> None:
        import torch

        healthy = self._without_bad(tracer, batch) if self.options.answers.skip_bad else batch
        if healthy is None:
            return
        try:
            tracer.add(healthy, logits_to_keep=1)
        except torch.OutOfMemoryError:
            raise
        except (ShapeMoeError, RuntimeError) as error:
            bad = [row for row in range(len(healthy.examples)) if tracer.failure(healthy.rows([row])) is not None]
            names = [healthy.examples[row].where for row in bad] or [example.where for example in healthy.examples]
            raise ShapeMoeError(f"Tracing failed at {', '.join(names)}: {first_line(error)}") from error

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
                self.calibrator.skipped[example.where] = reason
        return batch.rows(good) if good else None

    def _result(self, tracer: ModelTracer, earlier: Trace | None) -> Trace:
        traced = [earlier] if earlier is not None else []
        info = self.info(tracer.moe, tracer.layers, tracer.implementation, tracer.dtype)
        if tracer.batches:
            traced.append(Trace(info, tracer.statistics(), tracer.coalitions()))
        if not traced:
            raise DataError(f"No record of {self.options.data.source} could be traced.")
        return replace(merge_traces(traced) if len(traced) > 1 else traced[0], info=info)

    def info(
        self, moe: MoeConfig, layers: tuple[int, ...], implementation: str, dtype: str, engine: str = "transformers"
    ) -> TraceInfo:
        """Where the trace comes from, once the calibration set is known.

        Raises:
            ShapeMoeError: when a file of the model has changed since the session began.
        """
        files, snapshot = self._files, self.snapshot
        if files is not None and snapshot is not None and (changed := files.touched(snapshot.path)) is not None:
            raise ShapeMoeError(f"{changed} while the model was traced; run the command again.")
        calibrator = self.calibrator
        examples = [example for example in calibrator.examples if example.where not in calibrator.skipped]
        prompt = sum(example.prompt_length for example in examples)
        total = sum(len(example.tokens) for example in examples)
        return TraceInfo(
            **self._origin(),
            family=moe.family.model_type,
            num_experts=moe.num_experts,
            routing=moe.routing,
            layers=layers,
            tokens={"prompt": prompt, "response": total - prompt},
            examples=len(examples),
            engine=engine,
            implementation=implementation,
            dtype=dtype,
            source={**calibrator.source(), **self.source_notes},
            versions=versions("torch", "transformers", "tokenizers", "numpy"),
            traced_files=self._files,
        )

    def _origin(self) -> Origin:
        if self.snapshot is not None:
            return origin(self.snapshot)
        name = str(self.model.name_or_path or type(self.model).__name__)
        return Origin(model=name, revision=None, fingerprint=UNVERIFIED, layout_fingerprint=UNVERIFIED)

    def _load_so_far(self, folder: Path | None) -> tuple[Trace | None, int]:
        if folder is None or not (folder / "so-far.json").is_file():
            return None, 0
        done = int(json.loads((folder / "so-far.json").read_text(encoding="utf-8"))["batches"])
        kept = load_trace(folder / f"so-far-{done}")
        self.calibrator.skipped |= kept.info.source["skipped"]
        return kept, done


def load_original(snapshot: Snapshot, device: str, dtype: str, progress: Progress) -> PreTrainedModel:
    """Load the full model as a phase of its own; see :func:`shape_moe.architectures.loading.load_model`."""
    with progress.phase("Loading the model", 1, "model") as advance:
        model = load_model(snapshot, device=device, dtype=dtype, note=progress.note)
        advance(1)
    return model


def _save_so_far(folder: Path, kept: Trace, done: int) -> None:
    """Save an unfinished trace; ``so-far.json`` names the folder that is complete."""
    kept.save(folder / f"so-far-{done}")
    write_json(folder / "so-far.json", {"batches": done})
    for old in folder.glob("so-far-*"):
        if old.name != f"so-far-{done}":
            shutil.rmtree(old)
