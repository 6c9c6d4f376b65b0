"""Progress of long work, as the jobs see it; the command line decides how it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows phases of work and passes notes on to the user."""

    def phase(self, title: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Begin a phase of ``total`` units; the returned function reports units done."""

    def note(self, text: str) -> None:
        """Tell the user something that is worth a line."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def phase(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """Do nothing."""
        del title, total, unit
        yield lambda _: None

    def note(self, text: str) -> None:
        """Do nothing."""
        del text


SILENT = Silent()
