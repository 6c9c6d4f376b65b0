"""One traced model: loaded when it is first needed, and kept for what follows (the canary)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from shape_moe.architectures.fingerprint import UNVERIFIED, Origin, fingerprint, layout_fingerprint, origin
from shape_moe.architectures.loading import free_memory, load_model, load_tokenizer
from shape_moe.architectures.moe_config import MoeConfig, foreign_code
from shape_moe.architectures.plain_model import check_observable
from shape_moe.architectures.same_routers import router_hashes
from shape_moe.architectures.sites import live_moe_config
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.example_maker import Answerer, AnswerOptions, ExampleMaker
from shape_moe.calibration.examples import TokenOptions, tokeniser_of
from shape_moe.calibration.reading import load
from shape_moe.calibration.records import DataOptions, Record
from shape_moe.calibration.responses import generate_answers
from shape_moe.calibration.sources import Data
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.forgotten import group_names
from shape_moe.jobs.keep_also import with_general
from shape_moe.jobs.way import STREAM, WAYS, check_answers_fit, check_live, check_shared, check_way, choose_way
from shape_moe.made_with import versions
from shape_moe.progress import Progress
from shape_moe.traced_files import traced_files
from shape_moe.tracing.classes import NO_CLASS, check_classes
from shape_moe.tracing.custom_code import check_traceable
from shape_moe.tracing.engine import Engine, Work, check_engine, get_engine
from shape_moe.tracing.ranks import Ranks
from shape_moe.tracing.trace import Trace, TraceInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SAMPLES = 128
"""Records that are used when nothing else is said."""


@dataclass(frozen=True)
class ExampleOptions:
    """Examples for a model, and how it runs over them: to be traced, or to judge by.

    Attributes:
        data: the records.
        tokens: how its records become tokens.
        answers: what happens to prompts without a response; batch size and limits.
        device: where to run.
        dtype: in which dtype, ``auto`` for the checkpoint's.
        trust_remote_code: run the code that comes with the model instead of Transformers' own, where there is some.
        stream: trace layer by layer (True), or with the whole model in memory (False); None decides by free memory.
        engine: what fills a trace: ``transformers`` (every statistic), ``vllm`` (coalitions and counts; for models of
            several GPUs), or one that another package registers.
        engine_args: further arguments of the engine, for vLLM those of ``vllm.LLM`` such as ``tensor_parallel_size``.
        keep_also: groups of general prompts (see :mod:`shape_moe.evaluation.forgotten`) to calibrate with as well, each
            a class of its own; the model answers them.
        replacement: run the router's next choice as well, one more expert for every token, for scorer ``replacement``.

    Raises:
        UsageError: for an unknown engine, for arguments of one that takes none, and for one that ``stream`` excludes.
    """

    data: DataOptions
    tokens: TokenOptions = field(default_factory=TokenOptions)
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    stream: bool | None = None
    engine: str = "transformers"
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    replacement: bool = True
    keep_also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_engine(self.engine, self.engine_args)
        object.__setattr__(self, "keep_also", group_names(self.keep_also))
        check_way(self.engine, self.stream)
        if self.answers.skip_bad and not self.data.skip_bad:
            object.__setattr__(self, "data", replace(self.data, skip_bad=True))

    def job(self) -> dict[str, Any]:
        """What decides the trace, for the job file."""
        return asdict(self)


def as_example_options(data: ExampleOptions | DataOptions | Data, samples: int) -> ExampleOptions:
    """Example options from data or data options alone; ``samples`` is for the former."""
    if isinstance(data, ExampleOptions):
        return data
    if isinstance(data, DataOptions):
        return ExampleOptions(data)
    return ExampleOptions(DataOptions.of(data, samples=samples))


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
        ranks: the processes that share the calibration set.
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
        self.ranks = Ranks.of_this_run()
        options = replace(options, device=self.ranks.device(options.device))
        self.snapshot, self._model, self.options, self.progress = snapshot, model, options, progress
        config = snapshot.config if snapshot else model.config.to_dict()  # type: ignore[union-attr]  # one is there
        tokeniser = tokeniser_of(tokenizer, config, options.tokens)
        self.tokenizer = tokenizer
        self.source_notes: dict[str, str] = {}
        loaded = load(options.data, progress) if records is None else None
        self._files = traced_files(snapshot.path) if snapshot else None
        skipped = loaded.skipped if loaded else {}
        found = with_general(loaded.records if loaded else records or [], options.keep_also, options.data)
        check_classes({record.group or NO_CLASS for record in found})
        self.calibrator = ExampleMaker(found, tokeniser, options.data, options.answers, progress, skipped)

    @classmethod
    def open(
        cls,
        model: str | PathLike[str] | PreTrainedModel | Snapshot,
        options: ExampleOptions,
        tokenizer: PreTrainedTokenizerBase | None,
        progress: Progress,
        records: list[Record] | None = None,
        *,
        revision: str | None = None,
    ) -> ModelSession:
        """Check everything that can be checked before weights are loaded.

        Raises:
            ShapeMoeError: when the model, its tokenizer or the data cannot be used.
        """
        free_memory(options.device)
        if isinstance(model, str | PathLike):
            model = open_snapshot(model, revision, trust_remote_code=options.trust_remote_code)
        if isinstance(model, Snapshot):
            _ = model.moe_layers
            check_observable(model)
            return cls(
                model,
                None,
                tokenizer or tokenizer_for(model, options.tokens),
                options,
                progress,
                records,
            )
        if tokenizer is None:
            raise UsageError("A live model needs its tokenizer: trace(model, data, tokenizer=...).")
        if revision is not None:
            raise UsageError("A live model has no revisions: leave revision out.")
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
        statistics = sorted(self.engine.statistics())
        records = self.calibrator.content_hash
        return {"model": model, "layout": layout, "records": records, "statistics": statistics, **self.options.job()}

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

    @property
    def engine(self) -> Engine:
        """What fills the trace."""
        return get_engine(self.options.engine)

    def run(self, folder: Path | None) -> Trace:
        """Answer, tokenise and trace, as part of a larger job; see :meth:`trace`.

        Raises:
            UsageError: for an engine that leaves no model in this process for the rest of the job, and for several
                processes.
        """
        if self.ranks.count > 1:
            raise UsageError("Only a trace by itself is shared by several processes (torchrun): make it with trace.")
        if not self.engine.shares_model:
            raise UsageError(
                f"Only a trace by itself is made with {self.engine.name}: make it with `shape-moe trace --engine "
                f"{self.engine.name}`, and start from it (--trace)."
            )
        return self.trace(folder)

    def trace(self, folder: Path | None) -> Trace:
        """Answer, tokenise and trace; intermediate results go to ``folder`` and are found there again.

        Raises:
            ShapeMoeError: when a batch cannot be traced; the message names the record.
            DataError: when no record could be traced.
        """
        work = Work(
            snapshot=self.snapshot,
            model=lambda: self.model,
            answerer=self.answerer,
            examples=self.calibrator,
            ranks=self.ranks,
            describe=self.info,
            release=self.unload,
            device=self.options.device,
            dtype=self.options.dtype,
            arguments=self.options.engine_args,
            progress=self.progress,
            replacement=self.options.replacement,
        )
        check_shared(self.options, self.ranks)
        return self.ranks.merged(self._chosen_engine(folder).open(work).fill(folder))

    def _chosen_engine(self, folder: Path | None) -> Engine:
        """What fills the trace: of the ways to run a Transformers model, the one that was asked for or fits.

        Raises:
            UsageError: when a live model is to be read layer by layer.
        """
        if self.engine.name not in WAYS:
            return self.engine
        if self.snapshot is None:
            check_live(self.options)
            return self.engine
        way = choose_way(self.snapshot, self.options, folder, loaded=self._model is not None)
        if way.reason is not None:
            self.progress.note(way.reason)
        return get_engine(way.engine)

    @property
    def reads_layers(self) -> bool:
        """Whether the model is read layer by layer, as was asked for or because it does not fit into memory."""
        if self.engine.name not in WAYS or self.snapshot is None:
            return False
        return choose_way(self.snapshot, self.options, None, loaded=self._model is not None).engine == STREAM

    def answerer(self) -> Answerer:
        """What lets the model answer prompts.

        Raises:
            ShapeMoeError: when the whole model does not fit into memory.
        """
        if self._model is None and self.snapshot is not None and self.options.stream is not False:
            check_answers_fit(self.snapshot, self.options, len(self.calibrator.open))
        return partial(generate_answers, self.model, batch_size=self.options.answers.batch_size)

    def info(self, moe: MoeConfig, layers: tuple[int, ...], implementation: str, dtype: str, engine: str) -> TraceInfo:
        """Where the trace comes from, once the calibration set is known.

        Raises:
            ShapeMoeError: when a file of the model has changed since the session began.
        """
        files, snapshot = self._files, self.snapshot
        if files is not None and snapshot is not None and (changed := files.touched(snapshot.path)) is not None:
            raise ShapeMoeError(f"{changed} while the model was traced; run the command again.")
        calibrator = self.calibrator
        examples = [example for example in calibrator.examples if example.where not in calibrator.skipped]
        response = sum(example.response_tokens for example in examples)
        total = sum(len(example.tokens) for example in examples)
        return TraceInfo(
            **self._origin(),
            family=moe.family.model_type,
            num_experts=moe.num_experts,
            routing=moe.routing,
            layers=layers,
            tokens={"prompt": total - response, "response": response},
            examples=len(examples),
            engine=engine,
            implementation=implementation,
            dtype=dtype,
            source={**calibrator.source(), **self.source_notes},
            versions=versions("torch", "transformers", "tokenizers", "numpy"),
            traced_files=self._files,
            routers=router_hashes(snapshot) if snapshot is not None else None,
        )

    def _origin(self) -> Origin:
        if self.snapshot is not None:
            return origin(self.snapshot)
        name = str(self.model.name_or_path or type(self.model).__name__)
        return Origin(model=name, revision=None, fingerprint=UNVERIFIED, layout_fingerprint=UNVERIFIED)


def tokenizer_for(snapshot: Snapshot, options: TokenOptions) -> PreTrainedTokenizerBase:
    """The tokenizer that examples are read with: the model's own, or that of the folder that the options name.

    Raises:
        CheckpointError: when there is none that can be loaded.
    """
    if options.tokenizer is None:
        return load_tokenizer(snapshot.path, trust_remote_code=snapshot.trust_remote_code)
    folder = Path(options.tokenizer)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder} to read a tokenizer from (--tokenizer).")
    return load_tokenizer(folder)


def load_original(snapshot: Snapshot, device: str, dtype: str, progress: Progress) -> PreTrainedModel:
    """Load the full model as a phase of its own; see :func:`shape_moe.architectures.loading.load_model`."""
    with progress.phase("Loading the model", 1, "model") as advance:
        model = load_model(snapshot, device=device, dtype=dtype, note=progress.note)
        if snapshot.trust_remote_code and foreign_code(snapshot.config) is not None:
            check_traceable(model)
        advance(1)
    return model
