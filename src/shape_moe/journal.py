"""A file that grows by one JSON line per finished piece of work, for a run that may be stopped at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from shape_moe.errors import CheckpointError

Key = str | tuple[str, ...]
Work = TypeVar("Work")


class Journal(dict[Key, Work]):
    """Finished work by its key, that of an earlier run included.

    A line that was cut short when a run was stopped is taken out of the file, so that the next one stands by itself.

    Args:
        file: the file, which need not exist; None keeps work in memory only.
        key: what a line calls the key, a text or a list of them.
        work: what a line calls the work, which must be fit for JSON.

    Raises:
        CheckpointError: when the file holds something else.
    """

    def __init__(self, file: Path | None, key: str, work: str) -> None:
        self._file, self._names = file, (key, work)
        lines = _whole_lines(file) if file is not None and file.is_file() else []
        try:
            entries = [json.loads(line) for line in lines]
            known = {_as_key(entry[key]): entry[work] for entry in entries}
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged; delete it, and its work is done again.") from error
        super().__init__(known)

    def put(self, key: Key, work: Work) -> None:
        """Remember a piece of work, on disk at once."""
        self[key] = work
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(dict(zip(self._names, (key, work), strict=True))) + "\n")


def _whole_lines(file: Path) -> list[str]:
    """The lines of a file; the beginning of one at its end is cut off."""
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    return whole.decode(errors="replace").splitlines()


def _as_key(found: str | list[str]) -> Key:
    return found if isinstance(found, str) else tuple(found)
