"""What a result says of how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

_COMMAND: ContextVar[str] = ContextVar("command", default="")


@contextmanager
def command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Say that what runs meanwhile was asked for by the command ``shape-moe`` with these arguments."""
    before = _COMMAND.set(shlex.join(["shape-moe", *arguments]))
    try:
        yield
    finally:
        _COMMAND.reset(before)


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package and of others that decide figures.

    Raises:
        PackageNotFoundError: when one is not installed.
    """
    return {name: version(name) for name in ("shape-moe", *packages)}


def made_with(seed: int) -> dict[str, Any]:
    """The seed, the versions and the command, for the documents of verbs that run models.

    The command can be pasted into a shell; it is empty where Python called the verb.
    """
    return {"seed": seed, "versions": versions("torch", "transformers"), "command": _COMMAND.get()}
