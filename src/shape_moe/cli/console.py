"""What a user sees: results on stdout, everything else on stderr, progress as fits the place."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.style import StyleType
from rich.table import Table
from rich.text import Text

from shape_moe.text import printable
from shape_moe.units import counted, readable_duration, readable_size

_PLAIN_SECONDS = 10.0
_ENDLESS = 100_000
"""Columns of a file or a pipe, which has no width to fold at."""


@dataclass(frozen=True)
class Output:
    """How a verb talks: ``as_json`` prints one object and nothing else on stdout."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        level = logging.INFO if self.verbose else logging.ERROR
        logging.basicConfig(level=level, stream=sys.stderr, format="%(name)s: %(message)s")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
        if not self.verbose:
            warnings.filterwarnings("ignore")
            _quiet_libraries()

    @property
    def err(self) -> Console:
        """The console of everything that is not a result."""
        return new_console(stderr=True)

    def note(self, text: str) -> None:
        """One line about what is going on."""
        if not self.quiet:
            self.err.print(text, markup=False)

    def begin(self, text: str) -> None:
        """Say on a terminal what happens before the first progress: libraries alone take seconds to start."""
        if self.err.is_terminal:
            self.note(text)

    def warn(self, text: str) -> None:
        """Something that the user should act on; shown also when quiet."""
        self.err.print(Text("Warning: ", style="yellow") + Text(text))

    def result(self, document: dict[str, Any], show: Callable[[Console], None]) -> None:
        """The verb's result: as JSON, or shown to a person."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=1, default=str) + "\n")
        else:
            show(new_console())

    @contextmanager
    def phase(self, title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Progress on a terminal, plain lines elsewhere, nothing when quiet.

        What has one step only gets no bar, which could but stand at nothing and then at all: it shows how long it has
        taken so far.
        """
        if self.quiet:
            yield lambda _: None
        elif self.err.is_terminal:
            title_column = TextColumn("{task.description}", markup=False)
            columns: tuple[ProgressColumn, ...] = (SpinnerColumn(finished_text="✓"), title_column, TimeElapsedColumn())
            if total > 1:
                columns = (title_column, BarColumn(), _Count(unit), _Rate(unit), _Left())
            with Progress(*columns, console=self.err) as bars:
                bar = bars.add_task(title, total=max(total, 1))
                yield lambda count: bars.advance(bar, count)
        else:
            lines = _PlainLines(self, title, total, unit)
            yield lines.advance
            lines.close()


def new_console(**settings: Any) -> Console:
    """A console that spells out control characters in whatever it shows, such as those in a file's name.

    On a terminal lines are folded between words; elsewhere they are not folded at all.
    """
    console = Console(highlight=False, **settings)
    if not console.is_terminal and "width" not in settings:
        console.width = _ENDLESS
    console.push_render_hook(_PrintableOnly())
    return console


def show_commands(console: Console, commands: Iterable[str]) -> None:
    """Commands to copy: indented, and never folded."""
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)


class _PrintableOnly(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(renderable) for renderable in renderables]


@dataclass(frozen=True)
class _Printable:
    content: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.content, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def amount(count: float, unit: str) -> str:
    """A number of units, readable."""
    return readable_size(count) if unit == "B" else counted(count, unit)


def _done_of(done: float, total: float, unit: str) -> str:
    """How much of all is done, the unit named once."""
    return f"{readable_size(done) if unit == 'B' else f'{done:,.0f}'} of {amount(total, unit)}"


def speed(rate: float, unit: str) -> str:
    """Units per second, or seconds per unit where that is the readable way round."""
    return f"{amount(rate, unit)}/s" if rate >= 1 or unit == "B" else f"{1 / rate:.1f} s per {unit}"


class _Left(ProgressColumn):
    """The time that is left, as soon as it can be told."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        words = "" if left is None or task.finished else f"{readable_duration(left)} left"
        return Text(words, style="progress.remaining")


class _Count(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(_done_of(task.completed, task.total or 0, self.unit), style="progress.download")


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(speed(rate, self.unit) if rate else "", style="progress.data.speed")


class _PlainLines:
    """Progress without a terminal: a line now and then, and one at the end."""

    def __init__(self, output: Output, title: str, total: int, unit: str) -> None:
        self.output, self.title, self.total, self.unit = output, title, total, unit
        self.done, self.began, self.said = 0, time.monotonic(), time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= _PLAIN_SECONDS and 0 < self.done < self.total:
            rate = self.done / (now - self.began)
            left = (self.total - self.done) / rate
            done = _done_of(self.done, self.total, self.unit)
            self.output.note(f"{self.title}: {done}, {speed(rate, self.unit)}, {readable_duration(left)} left")
            self.said = now

    def close(self) -> None:
        seconds = time.monotonic() - self.began
        rate = f", {speed(self.done / seconds, self.unit)}" if self.total > 1 and self.done and seconds > 0 else ""
        count = f"{amount(self.total, self.unit)} in " if self.total > 1 else ""
        self.output.note(f"{self.title}: {count}{seconds:.1f} s{rate}")


class _LiteralTable(Table):
    """A table whose cells are shown as they are: names of files may hold what reads as markup."""

    def add_row(self, *cells: RenderableType | None, style: StyleType | None = None, end_section: bool = False) -> None:
        shown = [Text(cell) if isinstance(cell, str) else cell for cell in cells]
        super().add_row(*shown, style=style, end_section=end_section)


def plain_table(*headings: str, title: str | None = None) -> Table:
    """An empty table whose first column is text and whose others are numbers."""
    title = None if title is None else escape(title)
    table = _LiteralTable(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(escape(heading), justify="left" if i == 0 else "right", overflow="fold")
    return table
