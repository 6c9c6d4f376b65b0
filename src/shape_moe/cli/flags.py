"""Options that mean the same everywhere, in groups: a verb names the groups that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.console import Output
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.values import (
    parse_count,
    parse_layers,
    parse_pairs,
    parse_protect,
    parse_routing,
    parse_size,
    parse_values,
)
from shape_moe.errors import UsageError
from shape_moe.jobs.inspect import keep_that_fits
from shape_moe.jobs.select import SelectionJob
from shape_moe.jobs.session import ExampleOptions
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.trace import SegmentWeights

DATA_PANEL = "Task examples"
CHOICE_PANEL = "Choosing experts"
RUN_PANEL = "Running"
MEMORY_PANEL = "What must fit"
_HELD_OUT_READING = ("--split", "--subset", "--map")
"""The data options that --held-out is read with."""

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a model's name on the hub.")]


@dataclass
class OutputFlags:
    """How a verb talks."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; warnings stay.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries have to say.")] = False

    def output(self) -> Output:
        """The output that these flags describe."""
        return Output(self.as_json, self.quiet, self.verbose)


@dataclass
class ForceFlag:
    """Permission to replace things."""

    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier result; accept artifacts of unknown origin.")
    ] = False


@dataclass
class SeedFlag:
    """The seed."""

    seed: Annotated[int, typer.Option(help="Draws samples, and the values of scorer random.")] = 0


@dataclass
class DeviceFlags:
    """Where and in what precision a model runs."""

    device: Annotated[
        str,
        typer.Option(
            help="Where to run: auto (GPUs where there are some), cpu, cuda, cuda:N.", rich_help_panel=RUN_PANEL
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        typer.Option(help="Precision: auto (the checkpoint's), float32, bfloat16, float16.", rich_help_panel=RUN_PANEL),
    ] = "auto"


@dataclass
class MemoryFlags:
    """The memory that a model has to fit."""

    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that must hold weights and KV cache, as 24GiB.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None
    context: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="With --fit: tokens per sequence in the KV cache, as 16k.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = "4096"
    concurrency: Annotated[
        int, typer.Option(help="With --fit: sequences at once in the KV cache.", rich_help_panel=MEMORY_PANEL)
    ] = 1

    def size(self) -> int | None:
        """Bytes of the device, None for any.

        Raises:
            UsageError: for options that say what else must fit where no memory is given.
        """
        if self.fit:
            return parse_size(self.fit)
        if unread := changed_flags(self):
            raise UsageError(f"{' and '.join(unread)} count with --fit only: give it, or leave them out.")
        return None

    def tokens(self) -> int:
        """Tokens per sequence in the KV cache."""
        return parse_count(self.context)

    def most_keep(self, model: str, revision: str | None = None) -> float | None:
        """The largest keep rate of a model that fits, None for no limit."""
        size = self.size()
        if size is None:
            return None
        return keep_that_fits(open_snapshot(model, revision), size, self.tokens(), self.concurrency)


@dataclass
class DataFlags:
    """The calibration set, and how it becomes tokens."""

    data: Annotated[
        str | None,
        typer.Option(
            help="JSONL, JSON, CSV or Parquet file, or a dataset's name: records with text, prompt (+ response) or "
            "messages. A known benchmark is preset:NAME, or preset:NAME@PATH from a local copy.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    samples: Annotated[int | None, typer.Option(help="Use at most this many records.", rich_help_panel=DATA_PANEL)] = (
        None
    )
    stratify: Annotated[
        str | None, typer.Option(help="Equal numbers of samples per value of this field.", rich_help_panel=DATA_PANEL)
    ] = None
    split: Annotated[
        str | None,
        typer.Option(help="Split of a dataset. Default: train, or the preset's.", rich_help_panel=DATA_PANEL),
    ] = None
    subset: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.", rich_help_panel=DATA_PANEL)] = (
        None
    )
    field_map: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="OURS=YOURS",
            help="Where a field has another name in your data, as prompt=question; repeat it.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    max_length: Annotated[
        int | None, typer.Option(help="Cut examples to this many tokens.", rich_help_panel=DATA_PANEL)
    ] = None
    max_tokens: Annotated[
        int, typer.Option(help="Stop adding examples at this many tokens.", rich_help_panel=DATA_PANEL)
    ] = 100_000
    no_template: Annotated[
        bool, typer.Option("--no-template", help="Raw text, no chat template.", rich_help_panel=DATA_PANEL)
    ] = False
    template_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Variable of the chat template, as enable_thinking=false; repeat it.", rich_help_panel=DATA_PANEL
        ),
    ] = None
    max_new_tokens: Annotated[
        int,
        typer.Option(help="Longest answer to a prompt without a response; 0 for none.", rich_help_panel=DATA_PANEL),
    ] = 512
    responses_from: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Take those answers from this OpenAI-compatible endpoint.", rich_help_panel=DATA_PANEL
        ),
    ] = None
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave failing records out, and count them.", rich_help_panel=DATA_PANEL)
    ] = False
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.", rich_help_panel=RUN_PANEL)] = 8

    def held_out(self, source: str, seed: int) -> DataOptions:
        """Other examples, with fields named and split as these flags say."""
        fields = parse_pairs(self.field_map, "--map")
        return DataOptions(source, split=self.split, subset=self.subset, fields=fields, seed=seed)

    def refuse_unread(self, held_out: str | None) -> None:
        """Refuse options that would change nothing because a trace is there already.

        Args:
            held_out: other examples, which are read with some of these options whatever ``--data`` says.

        Raises:
            UsageError: naming the options that nobody reads.
        """
        if self.data is not None:
            if self.samples is not None:
                raise UsageError(
                    "The trace has been made: --held-out-samples says how many to judge by, not --samples."
                )
            return
        read = _HELD_OUT_READING if held_out is not None else ()
        if unread := [name for name in changed_flags(self) if name not in read]:
            raise UsageError(f"The trace decides how examples are read: leave {', '.join(unread)} out, or give --data.")

    def options(self, device: DeviceFlags, seed: int, samples: int) -> ExampleOptions:
        """The trace options that these flags describe; ``samples`` is the verb's default."""
        if self.data is None:
            raise UsageError("Calibration data is missing: give --data FILE.")
        data = DataOptions(
            source=self.data,
            split=self.split,
            subset=self.subset,
            fields=parse_pairs(self.field_map, "--map"),
            samples=samples if self.samples is None else self.samples,
            stratify=self.stratify,
            seed=seed,
        )
        tokens = TokenOptions(
            template=not self.no_template,
            template_args=parse_values(self.template_arg, "--template-arg"),
            max_length=self.max_length,
        )
        answers = AnswerOptions(
            max_new_tokens=self.max_new_tokens,
            responses_from=self.responses_from,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            skip_bad=self.skip_bad,
        )
        return ExampleOptions(data=data, tokens=tokens, answers=answers, device=device.device, dtype=device.dtype)


@dataclass
class WeightFlags:
    """What counts when experts are valued."""

    prompt_weight: Annotated[
        float, typer.Option(help="How much a prompt token counts.", rich_help_panel=CHOICE_PANEL)
    ] = 1.0
    response_weight: Annotated[
        float, typer.Option(help="How much a response token counts.", rich_help_panel=CHOICE_PANEL)
    ] = 1.0

    def options(self, seed: int) -> ScoreOptions:
        """The scoring options that these flags describe."""
        return ScoreOptions(SegmentWeights(self.prompt_weight, self.response_weight), seed)


@dataclass
class ScoreFlags(WeightFlags):
    """How experts are valued."""

    scorer: Annotated[
        str,
        typer.Option(help="How experts are valued; shape-moe score --list tells how.", rich_help_panel=CHOICE_PANEL),
    ] = "shape"


@dataclass
class SelectFlags:
    """How the budget is spent."""

    rule: Annotated[
        str | None,
        typer.Option(
            help="How layers share the budget: coverage (the default), uniform, global.", rich_help_panel=CHOICE_PANEL
        ),
    ] = None
    routing: Annotated[
        str | None,
        typer.Option(
            help="drop (router unchanged, pruned slots add nothing) or reroute (pruned experts leave the router). "
            "Default: drop; reroute for target stock.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            help="ragged (counts differ per layer; the default) or stock (equal counts: loads anywhere).",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Reproduce the paper's bisection, which stops this close to --keep.", rich_help_panel=CHOICE_PANEL
        ),
    ] = None
    skip_layers: Annotated[
        str | None, typer.Option(help="Layers that keep every expert, as 0,1,47.", rich_help_panel=CHOICE_PANEL)
    ] = None
    protect: Annotated[
        list[str] | None,
        typer.Option(
            help="Experts to keep in any case, as LAYER:EXPERT,EXPERT; repeat it.", rich_help_panel=CHOICE_PANEL
        ),
    ] = None
    multiple_of: Annotated[
        int,
        typer.Option(help="Every pruned layer keeps a multiple of this many experts.", rich_help_panel=CHOICE_PANEL),
    ] = 1
    allow_rounding: Annotated[
        bool,
        typer.Option(
            "--allow-rounding",
            help="Where --keep cannot be met, take the next smaller rate that can.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = False

    def job(self, keep: float, score: ScoreFlags, seed: int) -> SelectionJob:
        """The selection job that these flags describe."""
        target = self.target or "ragged"
        options = SelectOptions(
            keep=keep,
            rule=self.rule or "coverage",
            routing=parse_routing(self.routing, target),
            target=target,
            tolerance=self.tolerance,
            skip_layers=parse_layers(self.skip_layers),
            protect=parse_protect(self.protect),
            multiple_of=self.multiple_of,
            allow_rounding=self.allow_rounding,
        )
        return SelectionJob(options, score.scorer, score.options(seed))
