"""A result that is one file: nobody else makes it meanwhile, and it never takes the place of what it is made from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from shape_moe.errors import CheckpointError, ShapeMoeError, UsageError
from shape_moe.json_file import read_json
from shape_moe.locks import drop_left_lock, drop_lock, lock_of, take_lock
from shape_moe.source_files import is_one_of
from shape_moe.workspace import check_output_file, real_place, tell_full_disk


class OutputFile:
    """A file in the making; use it as a context manager around all of the work, and write it inside.

    A link is followed; what is no regular file (a pipe, ``/dev/stdout``) is not guarded.

    Args:
        file: the file; None for a result that is not written.
        force: replace an existing one.
        inputs: what it is made from; the output may be none of these files, nor one of those in these folders.
        journal: ending of the name of a file beside the output that keeps work for a run that goes on; empty for none.

    Attributes:
        journal: that file, which goes when the block ends well; None without one.

    Raises:
        UsageError: when the file exists, cannot be made, or is an input.
        ShapeMoeError: when another run makes it, and for a full disk inside the block.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | None,
        *,
        force: bool = False,
        inputs: Iterable[str | os.PathLike[str] | None] = (),
        journal: str = "",
    ) -> None:
        self.file = Path(file) if file is not None else None
        named = self.file if journal else None
        self.journal = named.with_name(f"{named.name}{journal}") if named is not None else None
        self._force, self._inputs = force, [given for given in inputs if given is not None]
        self._lock: tuple[Path, int] | None = None

    def __enter__(self) -> OutputFile:
        if self.file is None or (self.file.exists() and not self.file.is_file() and not self.file.is_dir()):
            return self
        place = real_place(self.file.absolute())
        try:
            self._check(self.file, place)
        except UsageError:
            self._tidy_up(place)
            raise
        lock = take_lock(lock_of(place))
        if lock is None:
            raise ShapeMoeError(f"Another run is at work on {self.file}; wait for it.")
        self._lock = lock_of(place), lock
        try:
            self._check(self.file, place)
        except BaseException:
            self._release()
            raise
        return self

    def _tidy_up(self, place: Path) -> None:
        """Delete what a run left that was killed once its result was written."""
        drop_left_lock(lock_of(place))
        journal = self.journal
        if journal is not None and journal.is_file() and place.is_file() and not _is_newer(journal, place):
            journal.unlink()

    def _check(self, file: Path, place: Path) -> None:
        check_output_file(file, force=self._force)
        if is_one_of(place, self._inputs) and not _is_result(place):
            raise UsageError(f"The output {file} is an input of this command; choose another output.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.journal is not None:
            self.journal.unlink(missing_ok=True)
        self._release()
        if error is not None and self.file is not None:
            tell_full_disk(error, self.file.parent)

    def _release(self) -> None:
        if self._lock is not None:
            drop_lock(*self._lock)
            self._lock = None


def _is_newer(journal: Path, result: Path) -> bool:
    """Whether a journal is of a run that is to replace the result, not of the one that wrote it."""
    return journal.stat().st_mtime_ns > result.stat().st_mtime_ns


def _is_result(file: Path) -> bool:
    """Whether a file is what a verb says of a model: it may lie in the model's folder, and is no part of it."""
    try:
        return "verb" in read_json(file)
    except CheckpointError:
        return False
