"""Options that say which examples calibrate, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shape_moe.calibration.chat import read_chat_template
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.shapes import FORMATS
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.flags import RUN_PANEL, LoadFlags
from shape_moe.cli.values import parse_pairs, parse_values
from shape_moe.errors import UsageError
from shape_moe.jobs.session import ExampleOptions

DATA_PANEL = "Task examples"
NO_CLASSES = "none"
"""What ``--stratify`` is given so that examples have no classes."""
_HELD_OUT_READING = ("--split", "--subset", "--map", "--format", "--skip-bad")
"""The data options that --held-out is read with."""


@dataclass
class KeepAlsoFlag:
    """General skills to keep."""

    keep_also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP",
            help="Calibrate with general prompts of this group as well, as a class of its own, answered by the model "
            "itself: arithmetic, code, json, languages (or one of them), refusals, small-talk or knowledge. Repeat it "
            "for several.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None

    def groups(self) -> tuple[str, ...]:
        """The groups."""
        return tuple(self.keep_also or ())


@dataclass
class DataFlags:
    """The calibration set, and how it becomes tokens."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Examples: a file (JSONL, JSON, CSV, Parquet, text; also .gz, .zst), a folder of such files, or a "
            "data set's name (NAME@REVISION), with records of any common shape. A known benchmark is preset:NAME, or "
            "preset:NAME@PATH from a local copy. Repeat it for several tasks.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="With several --data, one per source in the same order: how many examples each gives, relative to the "
            "others. Default: equal numbers.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    data_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="SHAPE",
            help=f"Read every record as this shape instead of recognising it: {', '.join(FORMATS)}.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    samples: Annotated[int | None, typer.Option(help="Use at most this many records.", rich_help_panel=DATA_PANEL)] = (
        None
    )
    stratify: Annotated[
        str | None,
        typer.Option(
            help="Make classes of the values of this field, in equal numbers; none for no classes. Default: classes by "
            "a field such as task or category, where there is one, as they come.",
            rich_help_panel=DATA_PANEL,
        ),
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
            help="Where a field has another name in your data, for example prompt=question; can be repeated.",
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
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Jinja file of a chat template, for tokenizers without one.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the tokenizer, where the model's own cannot be used (a GGUF file without one).",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None
    turns: Annotated[
        str,
        typer.Option(
            help="Which turns of the assistant count as response: all (reasoning and tool calls too) or the last.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = "all"
    template_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Variable of the chat template, for example enable_thinking=false; can be repeated.",
            rich_help_panel=DATA_PANEL,
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
        bool,
        typer.Option(
            "--skip-bad", help="Leave out records that cannot be used, and count them.", rich_help_panel=DATA_PANEL
        ),
    ] = False
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.", rich_help_panel=RUN_PANEL)] = 8
    no_replacement: Annotated[
        bool,
        typer.Option(
            "--no-replacement",
            help="Trace without the router's next choice, which costs one more expert per token; scorer replacement "
            "needs it.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False

    def held_out(self, source: str, seed: int) -> DataOptions:
        """Other examples, with fields named and split as these flags say."""
        fields = parse_pairs(self.field_map, "--map")
        return DataOptions(
            source,
            split=self.split,
            subset=self.subset,
            fields=fields,
            seed=seed,
            format=self.data_format,
            skip_bad=self.skip_bad,
        )

    def refuse_unread(self, held_out: str | None) -> None:
        """Refuse options that would change nothing because a trace is there already.

        Args:
            held_out: other examples, which are read with some of these options whatever ``--data`` says.

        Raises:
            UsageError: naming the options that nobody reads.
        """
        if self.data:
            if self.samples is not None:
                raise UsageError(
                    "The trace has been made: --held-out-samples says how many to judge by, not --samples."
                )
            return
        read = _HELD_OUT_READING if held_out is not None else ()
        if unread := [name for name in changed_flags(self) if name not in read]:
            raise UsageError(f"The trace decides how examples are read: leave {', '.join(unread)} out, or give --data.")

    def options(self, device: LoadFlags, seed: int, samples: int) -> ExampleOptions:
        """The trace options that these flags describe; ``samples`` is the verb's default."""
        if not self.data:
            raise UsageError("Calibration data is missing: give --data FILE.")
        data = DataOptions(
            source=self.data[0],
            also=tuple(self.data[1:]),
            weights=tuple(self.weight or ()),
            format=self.data_format,
            skip_bad=self.skip_bad,
            split=self.split,
            subset=self.subset,
            fields=parse_pairs(self.field_map, "--map"),
            samples=samples if self.samples is None else self.samples,
            stratify=None if self.stratify == NO_CLASSES else self.stratify,
            label="" if self.stratify == NO_CLASSES else None,
            seed=seed,
        )
        tokens = TokenOptions(
            template=not self.no_template,
            template_args=parse_values(self.template_arg, "--template-arg"),
            max_length=self.max_length,
            turns=self.turns,
            chat_template=None if self.chat_template is None else read_chat_template(self.chat_template),
            tokenizer=None if self.tokenizer is None else str(self.tokenizer.absolute()),
        )
        answers = AnswerOptions(
            max_new_tokens=self.max_new_tokens,
            responses_from=self.responses_from,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            skip_bad=self.skip_bad,
        )
        return ExampleOptions(
            data,
            tokens,
            answers,
            device.place,
            device.dtype,
            device.trust_remote_code,
            replacement=not self.no_replacement,
        )
