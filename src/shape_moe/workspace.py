"""Where results are made: a sibling ``DIR.partial`` that becomes ``DIR`` only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from shape_moe.errors import ShapeMoeError, UsageError

JOB_FILE = "job.json"


class Workspace:
    """A result folder in the making; use it as a context manager and call :meth:`complete` at the end.

    The same job (same inputs and options) finds what an interrupted run left and goes on from there; another job is
    refused. When the block ends without :meth:`complete`, the partial folder stays for the next try.

    Args:
        out: the final folder; an existing one that is not empty is refused.
        job: inputs and options that decide the result; a JSON object.
        force: replace an existing result once the new one is complete, and discard another job's partial folder.

    Attributes:
        path: the folder to write into.
        resumed: whether an earlier run of the same job left something.

    Raises:
        UsageError: when the output exists, or another job's partial folder is in the way.
    """

    def __init__(self, out: str | os.PathLike[str], job: Mapping[str, Any], *, force: bool = False) -> None:
        self.out = Path(out).absolute()
        self.path = self.out.with_name(self.out.name + ".partial")
        self._digest = job_digest(job)
        self._job, self._force = dict(job), force
        self._lock: IO[str] | None = None
        self.resumed = False

    def __enter__(self) -> Workspace:
        check_output(self.out, force=self._force)
        known = self._known_digest()
        if self.path.exists() and known != self._digest:
            if not self._force:
                raise UsageError(
                    f"{self.path} holds the unfinished work of another job (other inputs or options); "
                    "finish that job, delete the folder, or use --force to discard it."
                )
            shutil.rmtree(self.path)
        self.resumed = self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        write_json(self.path / JOB_FILE, {"digest": self._digest, "job": self._job})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release_lock()
        if error is not None and self.path.is_dir() and not self._holds_work():
            shutil.rmtree(self.path)

    def _holds_work(self) -> bool:
        return any(path.is_file() and path.name != JOB_FILE for path in self.path.rglob("*"))

    def complete(self) -> Path:
        """Give the folder its final name; an old result is moved aside first and deleted last."""
        (self.path / JOB_FILE).unlink()
        self._release_lock()
        aside = None
        if self.out.exists():
            aside = self.out.with_name(f"{self.out.name}.old-{uuid.uuid4().hex[:8]}")
            self.out.rename(aside)
        self.path.rename(self.out)
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
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise ShapeMoeError(f"Another run is at work in {self.path}; wait for it.") from error

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            (self.path / ".lock").unlink(missing_ok=True)


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output folder that already holds something.

    Raises:
        UsageError: when ``out`` is a file, or a folder that is not empty and ``force`` is not set.
    """
    if out.is_file():
        raise UsageError(f"{out} is a file; choose a folder for the output.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UsageError(f"{out} exists and is not empty; choose another output, or replace it with --force.")


def job_digest(job: Mapping[str, Any]) -> str:
    """sha256 of a job's description."""
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that the file is either old or new, never half."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(file)
