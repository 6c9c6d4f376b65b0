"""Options that mean the same everywhere, in groups: a verb names the groups that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shape_moe.architectures.placement import AUTOMATIC_MAPS, MAP
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.cli.console import Output
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.values import parse_count, parse_size
from shape_moe.errors import UsageError
from shape_moe.jobs.inspect import keep_that_fits

REJECTED = 3
"""Exit code where a model is not as good as it was required to be."""
RUN_PANEL = "Running"
MEMORY_PANEL = "What must fit"

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a name on the hub, or embedded.")]


@dataclass
class RevisionFlag:
    """The version of a model on the hub."""

    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub. Default: its newest version.")
    ] = None


@dataclass
class OutputFlags:
    """How a verb talks."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; warnings stay.")] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the messages of the libraries that are used.")
    ] = False

    def output(self) -> Output:
        """The output that these flags describe."""
        return Output(self.as_json, self.quiet, self.verbose)


@dataclass
class ForceFlag:
    """Permission to replace things."""

    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier result; accept files whose origin is unknown.")
    ] = False


@dataclass
class SeedFlag:
    """The seed."""

    seed: Annotated[
        int, typer.Option(help="Seed of everything that is drawn: samples, resamples, the scorer random.")
    ] = 0


@dataclass
class StreamFlag:
    """How a model lies in memory while it is traced and judged."""

    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Run layer by layer, for models larger than memory, or with the whole model in memory. Default: "
            "whole where it fits.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None


@dataclass
class DeviceFlags:
    """Where and in what precision a model runs."""

    device: Annotated[
        str,
        typer.Option(
            help="Where to run: auto (GPUs if there are any), cpu, cuda or cuda:N.", rich_help_panel=RUN_PANEL
        ),
    ] = "auto"
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help="Spread one model over GPUs, memory and disk instead: auto (by what is free), or a JSON file that "
            "maps its parts to GPU numbers, cpu or disk.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(help="Precision: auto (the checkpoint's), float32, bfloat16, float16.", rich_help_panel=RUN_PANEL),
    ] = "auto"

    @property
    def place(self) -> str:
        """Where the model lies: on a device, or as a map says.

        Raises:
            UsageError: where both are given.
        """
        if self.device_map is None:
            return self.device
        if self.device != "auto":
            raise UsageError("--device puts the whole model in one place, --device-map spreads it: leave one out.")
        named = self.device_map
        return f"{MAP}{named if named in AUTOMATIC_MAPS else Path(named).absolute()}"


@dataclass
class LoadFlags(DeviceFlags):
    """How a model is loaded, and where it runs."""

    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run the code that comes with the model instead of Transformers' own class.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False


@dataclass
class MemoryFlags:
    """The memory that a model has to fit."""

    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that must hold weights and KV cache, for example 24GiB.",
            rich_help_panel=MEMORY_PANEL,
        ),
    ] = None
    context: Annotated[
        str,
        typer.Option(
            metavar="TOKENS",
            help="With --fit: tokens per sequence in the KV cache, for example 16k.",
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
