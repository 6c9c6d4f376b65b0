"""Where results are made: a folder grows as a sibling ``DIR.partial``, a file as ``FILE.tmp``, until it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from shape_moe.errors import ShapeMoeError, UsageError

JOB_FILE = "job.json"
RESULT_FILES = ("shape/manifest.json", "trace.json", "demo.json", "sweep.json", "experiment.json")
"""What marks a folder as a result of this tool, which ``--force`` may replace."""


class Workspace:
    """A result folder in the making; use it as a context manager and call :meth:`complete` at the end.

    The same job (same inputs and options) finds what an interrupted run left and goes on from there; another job is
    refused. When the block ends without :meth:`complete`, the partial folder stays for the next try.

    Args:
        out: the final folder; an existing one that is not empty is refused.
        job: inputs and options that decide the result; a JSON object.
        force: replace an existing result once the new one is complete, and discard another job's partial folder.
        inputs: what the job reads; the output may not lie in it, hold it or be it.

    Attributes:
        path: the folder to write into.
        resumed: whether an earlier run of the same job left something.

    Raises:
        UsageError: when the output exists, touches an input, or another job's partial folder is in the way.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        job: Mapping[str, Any],
        *,
        force: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
    ) -> None:
        self.out = Path(out).absolute()
        self.path = self.out.with_name(self.out.name + ".partial")
        self._digest = job_digest(job)
        self._job, self._force, self._inputs = dict(job), force, tuple(inputs)
        self._lock: IO[str] | None = None
        self._lock_file = self.out.with_name(f".{self.out.name}.lock")
        self.resumed = False

    def __enter__(self) -> Workspace:
        check_output(self.out, force=self._force, inputs=self._inputs)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._prepare()
        except BaseException:
            self._release_lock()
            raise
        return self

    def _prepare(self) -> None:
        known = self._known_digest()
        if self.path.exists() and known != self._digest:
            if known is None and self._holds_work():
                raise UsageError(f"{self.path} is in the way and holds no work of this tool; move or delete it.")
            if not self._force and self._holds_work():
                raise UsageError(
                    f"{self.path} holds the unfinished work of another job (other inputs or options); "
                    "finish that job, delete the folder, or use --force to discard it."
                )
            shutil.rmtree(self.path)
        self.resumed = self.path.exists()
        self.path.mkdir(exist_ok=True)
        write_json(self.path / JOB_FILE, {"digest": self._digest, "job": self._job})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.path.is_dir() and not self._holds_work():
            shutil.rmtree(self.path)
        elif isinstance(error, KeyboardInterrupt):
            error.add_note(f"What was finished is kept in {self.path}; the same command resumes from there.")
        self._release_lock()

    def _holds_work(self) -> bool:
        return any(path.is_file() and not path.name.startswith(JOB_FILE) for path in self.path.rglob("*"))

    def complete(self) -> Path:
        """Give the folder its final name; an old result is moved aside first and deleted last."""
        aside = None
        if self.out.exists():
            aside = self.out.with_name(f"{self.out.name}.old-{uuid.uuid4().hex[:8]}")
            self.out.rename(aside)
        self.path.rename(self.out)
        (self.out / JOB_FILE).unlink()
        if aside is not None:
            shutil.rmtree(aside)
        return self.out

    def _known_digest(self) -> str | None:
        try:
            return str(json.loads((self.path / JOB_FILE).read_text(encoding="utf-8"))["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no advisory locks on this platform
            return
        self._lock = self._lock_file.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise ShapeMoeError(f"Another run is at work on {self.out}; wait for it.") from error

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock_file.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def check_output(out: Path, *, force: bool, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuse an output folder that already holds something, or that touches an input.

    Args:
        out: the folder.
        force: accept a folder that holds an earlier result of this tool (it has one of :data:`RESULT_FILES`).
        inputs: files and folders that the job reads; names that do not exist (hub names) are ignored.

    Raises:
        UsageError: when ``out`` is a file, a folder that is not empty, or lies in, holds or is an input.
    """
    place = out.resolve()
    for given in inputs:
        source = Path(given).resolve()
        if source.exists() and (source == place or source in place.parents or place in source.parents):
            raise UsageError(f"The output {out} and the input {given} overlap; choose an output beside it.")
    if out.is_file():
        raise UsageError(f"{out} is a file; choose a folder for the output.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise UsageError(f"{out} exists and is not empty; choose another output, or replace it with --force.")
    if not any((out / name).is_file() for name in RESULT_FILES):
        raise UsageError(f"{out} holds no result of this tool, so --force does not replace it; choose another output.")


def check_output_file(file: Path, *, force: bool) -> None:
    """Refuse an output file that is already there, or that has no folder to lie in.

    Args:
        file: the file.
        force: accept an existing file.

    Raises:
        UsageError: when ``file`` is a folder, exists and is not to be replaced, or cannot be made.
    """
    if file.is_dir():
        raise UsageError(f"{file} is a folder; choose a file for the output.")
    if file.exists() and not force:
        raise UsageError(f"{file} exists; choose another output, or replace it with --force.")
    if not file.parent.is_dir():
        raise UsageError(f"There is no folder {file.parent}; make it, or choose another output.")


def job_digest(job: Mapping[str, Any]) -> str:
    """sha256 of a job's description."""
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write text so that the file is either old or new, never half.

    A link stays one, and what is no regular file (a pipe, ``/dev/stdout``) is written to as it is.
    """
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8", newline="\n")
        return
    place = file.resolve()
    temporary = place.with_name(place.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(file: Path, content: Any) -> None:
    """Write JSON with :func:`write_text`."""
    write_text(file, json.dumps(content, indent=1, default=str) + "\n")
