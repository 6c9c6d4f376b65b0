"""What a result says of how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class MadeWith:
    """How a document was made.

    Attributes:
        seed: of everything that was drawn, None where it is not known.
        versions: of the packages that decide figures.
        command: can be pasted into a shell; empty where Python called the verb.
    """

    seed: int | None
    versions: Mapping[str, str]
    command: str

    @classmethod
    def now(cls, seed: int) -> MadeWith:
        """As this process makes it."""
        return cls(seed, versions("torch", "transformers"), _COMMAND.get())

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> MadeWith:
        """What :meth:`to_document` described, wherever it stands in a larger document."""
        seed, found = document.get("seed"), document.get("versions") or {}
        named = {str(name): str(number) for name, number in found.items()}
        return cls(None if seed is None else int(seed), named, str(document.get("command") or ""))


def made_with(seed: int) -> dict[str, Any]:
    """The seed, the versions and the command, for the documents of verbs that run models."""
    return MadeWith.now(seed).to_document()
