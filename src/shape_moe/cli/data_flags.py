"""Options that say which examples calibrate, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.flags import RUN_PANEL, DeviceFlags
from shape_moe.cli.values import parse_pairs, parse_values
from shape_moe.errors import UsageError
from shape_moe.jobs.session import ExampleOptions

DATA_PANEL = "Task examples"
_HELD_OUT_READING = ("--split", "--subset", "--map")
"""The data options that --held-out is read with."""


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
    template_arg: Annotated[
        list[str] | None,
        typer.Option(
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
