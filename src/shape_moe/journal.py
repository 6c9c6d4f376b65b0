"""A file that grows by one JSON line per finished piece of work, for a run that may be stopped at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Key = str | tuple[str, ...]
Work = TypeVar("Work")


class Journal:
    """What an earlier run has finished, and what this one adds.

    A line that was cut short when a run was stopped is taken out of the file, so that the next one stands by itself.

    Args:
        file: the file, which need not exist; None keeps entries in memory only.

    Attributes:
        entries: everything that is known, oldest first.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.entries: list[dict[str, Any]] = []
        if file is None or not file.is_file():
            return
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        self.entries = [json.loads(line) for line in whole.decode().splitlines()]
        if len(whole) < len(content):
            with file.open("r+b") as stream:
                stream.truncate(len(whole))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Remember an entry, on disk at once."""
        self.entries.append(dict(entry))
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")


class Known(dict[Key, Work]):
    """Finished work by its key, in memory and in a :class:`Journal` for the next run.

    Args:
        file: the journal, which need not exist; None keeps work in memory only.
        key: what a line calls the key, a text or a list of them.
        work: what a line calls the work, which must be fit for JSON.
    """

    def __init__(self, file: Path | None, key: str, work: str) -> None:
        self._journal, self._names = Journal(file), (key, work)
        super().__init__({_as_key(entry[key]): entry[work] for entry in self._journal.entries})

    def put(self, key: Key, work: Work) -> None:
        """Remember a piece of work, on disk at once."""
        self[key] = work
        self._journal.add(dict(zip(self._names, (key, work), strict=True)))


def _as_key(found: str | list[str]) -> Key:
    return found if isinstance(found, str) else tuple(found)
