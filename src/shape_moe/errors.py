"""Errors that a user can act on: one sentence each, no traceback on the command line."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import TypeVar

from shape_moe.python_names import in_python

Name = TypeVar("Name", bound=str)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "StorageFull", "Disk quota exceeded", "File too large")
"""How libraries that lose the error number tell of it."""
_FULL_NUMBER = re.compile(rf"os error ({'|'.join(str(number) for number in _FULL)})\b")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def full_disk(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that nothing more can be written."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        told = isinstance(found, Exception) and any(words in str(found) for words in _FULL_WORDS)
        if getattr(found, "errno", None) in _FULL or told or _FULL_NUMBER.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


class ShapeMoeError(Exception):
    """The work could not be done; the message says why and what to do. Exit code 1.

    Messages name options as the command has them; a note, which tracebacks show, says what they are in Python.
    """

    exit_code = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        if (note := in_python(str(self))) is not None:
            self.add_note(note)


class UsageError(ShapeMoeError):
    """The request itself is wrong: an option, a value or a combination of them. Exit code 2."""

    exit_code = 2


class InterruptError(ShapeMoeError):
    """Ctrl-C; the message says what was kept. Exit code 130, as shells have it."""

    exit_code = 130

    @classmethod
    def by(cls, interrupt: BaseException) -> InterruptError:
        """With the last of the notes that were attached to the interrupt on its way: the outermost job's."""
        return cls(" ".join(["Interrupted.", *getattr(interrupt, "__notes__", [])[-1:]]))


class UnsupportedModelError(ShapeMoeError):
    """A model family, kernel or quantisation that is not understood well enough to touch."""


class CheckpointError(ShapeMoeError):
    """A model folder or one of its files is missing, damaged or not what it claims to be."""


class ServingError(ShapeMoeError):
    """A server would not give the pruned model's answers, so it must not start."""


class DataError(ShapeMoeError):
    """A calibration record or file cannot be used."""


class FingerprintError(ShapeMoeError):
    """An artifact was made from another model."""


class BudgetError(UsageError):
    """No selection meets the budget under the constraints; carries the nearest budgets that can be met.

    Attributes:
        below: the largest feasible number of kept experts under the budget, or None.
        above: the smallest feasible number above it, or None.
    """

    def __init__(self, message: str, below: int | None, above: int | None) -> None:
        super().__init__(message)
        self.below = below
        self.above = above


def one_of(name: str, names: Sequence[Name], what: str) -> Name:
    """A name that is one of several.

    Args:
        name: as it was given.
        names: those that there are, at least two.
        what: what they name, at the beginning of a sentence.

    Raises:
        UsageError: for any other name.
    """
    for known in names:
        if name == known:
            return known
    raise UsageError(f"{what} must be {', '.join(names[:-1])} or {names[-1]}, not {name!r}.")
