"""Where results are made: a folder grows as a sibling ``DIR.partial``, a file as ``.FILE.tmp``, until it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from shape_moe.errors import ShapeMoeError, UsageError, full_disk
from shape_moe.exchange import exchange
from shape_moe.job_record import JOB_FILE, JobRecord, read_job
from shape_moe.locks import drop_left_lock, drop_lock, lock_of, take_lock
from shape_moe.made_with import versions
from shape_moe.source_files import SourceFile, changed_file, changed_since, describe_inputs

RESULT_FILES = ("shape/manifest.json", "trace.json", "demo.json", "sweep.json", "experiment.json", "series.json")
"""What marks a folder as a result of this tool, which ``--force`` may replace."""
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "polars")
"""What figures depend on, beside this package."""


@dataclass(frozen=True)
class Apart:
    """A file of a result that gets a name outside of the result's folder, at the moment at which that gets its own.

    Attributes:
        name: what it is called in the folder while that is in the making.
        places: its final name, by the suffix of the folder's; see :meth:`Workspace.complete`.
    """

    name: str
    places: Mapping[str, Path]


class Workspace:
    """A result folder in the making; use it as a context manager and call :meth:`complete` at the end.

    The same job (same inputs, options and package versions) finds what an interrupted run left and goes on from there;
    another job is refused. When the block ends without :meth:`complete`, the partial folder stays for the next try.
    A link is followed: the result lies where it points.

    Args:
        out: the final folder; an existing one that is not empty is refused.
        job: inputs and options that decide the result; a JSON object.
        force: replace an existing result once the new one is complete, and discard another job's partial folder.
        inputs: what the job reads. The output may not lie in it, hold it or be it, and its files may not change while
            the job runs, nor between an interrupted run and the one that goes on.
        suffixes: other endings that the final name may get; see :meth:`complete`.
        apart: a file that gets a name outside of the folder, None where there is none.

    Attributes:
        path: the folder to write into.
        resumed: whether an earlier run of the same job left something.

    Raises:
        UsageError: when the output exists, touches an input, or another job's partial folder is in the way.
        ShapeMoeError: when another run is at work there, an input has changed, or the disk is full.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        job: Mapping[str, Any],
        *,
        force: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
        suffixes: Iterable[str] = (),
        apart: Apart | None = None,
    ) -> None:
        self.out = Path(out).absolute()
        self._place = real_place(self.out)
        self._suffixes, self._apart = ("", *suffixes), apart
        self.path = self._place.with_name(self._place.name + ".partial")
        described = {**json.loads(json.dumps(job, default=str)), "versions": versions(*_PACKAGES)}
        self._record = JobRecord(job_digest(described), described)
        self._force, self._inputs = force, tuple(inputs)
        self._lock: int | None = None
        self._lock_file = lock_of(self._place)
        self.resumed = False

    def __enter__(self) -> Workspace:
        if not is_left_to_finish(self._place):
            check_output(self.out, force=self._force, inputs=self._inputs)
        self._place.parent.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self._lock_file)
        if self._lock is None:
            raise ShapeMoeError(f"Another run is at work on {self.out}; wait for it.")
        try:
            self._recover()
            check_output(self.out, force=self._force, inputs=self._inputs)
            for place in self._apart.places.values() if self._apart is not None else ():
                check_output_file(place, force=self._force)
            self._prepare()
        except BaseException as error:
            self._release_lock()
            tell_full_disk(error, self._place.parent)
            raise
        return self

    @property
    def digest(self) -> str:
        """sha256 of the job's description, package versions included."""
        return self._record.digest

    def _recover(self) -> None:
        """Finish, or take back, what a run left that was killed while its result got its name.

        A result that has its name is kept, and what it replaced goes. The same job takes it up once more, so that it
        ends as it would have.
        """
        begun = read_job(self.path)
        for suffix in self._suffixes:
            place = _suffixed(self._place, suffix)
            done = read_job(place)
            if done is not None and done.complete:
                if (old := self._replaced(done, place)) is not None:
                    shutil.rmtree(old)
                same = done.digest == self._record.digest and not self.path.exists()
                if same and changed_file(done.inputs, describe_inputs(self._inputs)) is None:
                    self._bring_back(place, suffix)
                    place.rename(self.path)
                else:
                    self._put_apart(place, suffix)
                    (place / JOB_FILE).unlink()
            elif begun is not None and not place.exists():
                old = self._replaced(begun, place)
                if old is not None and old != self.path:
                    old.rename(place)

    def _replaced(self, record: JobRecord, place: Path) -> Path | None:
        """Where the result that a record's job replaces under a name lies, None where it is gone."""
        if record.replaces is None:
            return None
        ours = rf"{re.escape(place.name)}\.old-[0-9a-f]{{8}}"
        if record.replaces != self.path.name and not re.fullmatch(ours, record.replaces):
            return None
        found = place.with_name(record.replaces)
        return found if found.is_dir() else None

    def _put_apart(self, place: Path, suffix: str) -> None:
        """Give the file that does not stay in the folder its own name."""
        if self._apart is not None and (place / self._apart.name).exists():
            (place / self._apart.name).replace(self._apart.places[suffix])

    def _bring_back(self, place: Path, suffix: str) -> None:
        """Undo :meth:`_put_apart`."""
        if self._apart is not None and not (place / self._apart.name).exists():
            with suppress(FileNotFoundError):
                self._apart.places[suffix].rename(place / self._apart.name)

    def _prepare(self) -> None:
        inputs = describe_inputs(self._inputs)
        if self.path.exists():
            known = read_job(self.path)
            if known is None and self._holds_work():
                raise UsageError(f"{self.path} is in the way and holds no work of this tool; move or delete it.")
            if known is None or (reason := self._why_not_resumed(known, inputs)) is not None:
                if self._holds_work() and not self._force:
                    raise UsageError(f"{self.path} holds the unfinished work of {reason}")
                shutil.rmtree(self.path)
        self.resumed = self.path.exists()
        self.path.mkdir(exist_ok=True)
        for unfinished in [file for file in self.path.rglob("*.tmp") if file.is_file()]:
            unfinished.unlink()
        self._record = replace(self._record, inputs=inputs)
        self._write_record(self._record)

    def _why_not_resumed(self, known: JobRecord, inputs: Mapping[str, SourceFile]) -> str | None:
        """The end of a sentence that says why a partial folder is not gone on with; None where it is."""
        discard = "finish that job, delete the folder, or use --force to discard it."
        if known.digest == self._record.digest:
            changed = changed_file(known.inputs, inputs)
            if changed is None:
                return None
            return f"a run whose input {changed} since: delete the folder, or use --force to discard it."
        keys = {**known.job, **self._record.job}
        different = [key for key in keys if known.job.get(key) != self._record.job.get(key)]
        if different == ["versions"]:
            return f"a run with other package versions; {discard}"
        return f"another job (other inputs or options: {', '.join(different)}); {discard}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.path.is_dir() and not self._holds_work():
            shutil.rmtree(self.path)
        elif isinstance(error, KeyboardInterrupt):
            error.add_note(f"What was finished is kept in {self.path}; the same command resumes from there.")
        self._release_lock()
        if error is not None:
            tell_full_disk(error, self._place.parent)

    def _holds_work(self) -> bool:
        return any(path.is_file() and path.name not in (JOB_FILE, f".{JOB_FILE}.tmp") for path in self.path.rglob("*"))

    def check_inputs(self) -> None:
        """Check that nothing that the job reads has changed since it began.

        Raises:
            ShapeMoeError: naming the first file that has.
        """
        if (changed := changed_since(self._record.inputs, self._inputs)) is not None:
            raise ShapeMoeError(
                f"{changed} while it was read, so the result would mix two states of it; run the command again with "
                f"--force, which discards {self.path}."
            )

    def complete(self, suffix: str = "") -> Path:
        """Give the folder its final name, and delete the result that it replaces.

        Args:
            suffix: stands behind the name that was asked for, where the result is not what was asked for; one of those
                that the workspace was told of.

        ``job.json`` goes last: as long as it is there, the next run knows what was under way (:meth:`_recover`), and
        the folder does not yet belong to the file that has a name apart.

        Raises:
            ShapeMoeError: when an input has changed meanwhile.
            UsageError: when something else has got the name meanwhile.
        """
        self.check_inputs()
        self.out, self._place = _suffixed(self.out, suffix), _suffixed(self._place, suffix)
        check_output(self.out, force=self._force)
        old = self._place.is_dir() and not _is_empty(self._place)
        if not (old and self._exchange()):
            aside = self._place.with_name(f"{self._place.name}.old-{uuid.uuid4().hex[:8]}") if old else None
            self._mark_complete(aside)
            if aside is not None:
                self._place.rename(aside)
            elif self._place.is_dir():
                self._place.rmdir()
            self.path.rename(self._place)
            if aside is not None:
                shutil.rmtree(aside)
        self._put_apart(self._place, suffix)
        (self._place / JOB_FILE).unlink()
        return self.out

    def _exchange(self) -> bool:
        """Swap the new result and the old one at once, where the platform can, and delete the old one."""
        self._mark_complete(self.path)
        if not exchange(self.path, self._place):
            return False
        shutil.rmtree(self.path)
        return True

    def _mark_complete(self, replaces: Path | None) -> None:
        name = replaces.name if replaces is not None else None
        self._write_record(replace(self._record, complete=True, replaces=name))

    def _write_record(self, record: JobRecord) -> None:
        write_json(self.path / JOB_FILE, asdict(record))

    def _release_lock(self) -> None:
        if self._lock is not None:
            drop_lock(self._lock_file, self._lock)
            self._lock = None


def is_left_to_finish(place: Path) -> bool:
    """Whether what stands under a final name is the work of a run that was killed just before its end.

    The next run looks at it under the lock.
    """
    return read_job(place) is not None


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def tell_full_disk(error: BaseException, folder: Path) -> None:
    """Raise what a full disk made of an error as one sentence; do nothing about any other."""
    if full_disk(error) and not isinstance(error, ShapeMoeError):
        raise ShapeMoeError(
            f"The disk of {folder} is full, or the limit on what may be written there is reached: free some space and "
            "run the same command again; it resumes where it stopped."
        ) from error


def real_place(out: Path) -> Path:
    """Where an output lies once links are followed.

    Raises:
        UsageError: for a link that points nowhere, also among the folders above.
    """
    for path in (out, *out.parents):
        if path.is_symlink() and not path.exists():
            raise UsageError(
                f"{path} is a link to {path.readlink()}, which does not exist; make that, or remove the link."
            )
    return out.resolve()


def check_output(out: Path, *, force: bool, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Refuse an output folder that already holds something, or that touches an input.

    Args:
        out: the folder.
        force: accept a folder that holds an earlier result of this tool (it has one of :data:`RESULT_FILES`).
        inputs: files and folders that the job reads; names that do not exist (hub names) are ignored.

    Raises:
        UsageError: when ``out`` is a file, a folder that is not empty, a link that points nowhere, or lies in, holds
            or is an input.
    """
    place = real_place(out)
    for given in inputs:
        source = Path(given).resolve()
        if source.exists() and (source == place or source in place.parents or place in source.parents):
            raise UsageError(f"The output {out} and the input {given} overlap; choose an output beside it.")
    if place.exists() and not place.is_dir():
        raise UsageError(f"{out} is a file; choose a folder for the output.")
    if place.is_mount():
        raise UsageError(f"{out} is the top of a disk, which cannot be renamed; choose a folder in it.")
    if _is_empty(place):
        return
    if not force:
        drop_left_lock(lock_of(place))
        raise UsageError(f"{out} exists and is not empty; choose another output, or replace it with --force.")
    if not any((place / name).is_file() for name in RESULT_FILES):
        raise UsageError(f"{out} holds no result of this tool, so --force does not replace it; choose another output.")


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except FileNotFoundError:  # also one that another run has just moved
        return True


def check_output_file(file: Path, *, force: bool) -> None:
    """Refuse an output file that is already there, or that has no folder to lie in.

    Args:
        file: the file.
        force: accept an existing file.

    Raises:
        UsageError: when ``file`` is a folder, exists and is not to be replaced, or cannot be made.
    """
    real_place(file.absolute())
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
    """Write text so that the file is either old or new, never half; of two that write at once the last one wins.

    A link stays one, and what is no regular file (a pipe, ``/dev/stdout``) is written to as it is.

    Raises:
        ShapeMoeError: when the disk is full.
    """
    content = text.encode()
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    place = file.resolve()
    temporary = place.with_name(f".{place.name}.tmp")
    descriptor = take_lock(temporary, wait=True)
    assert descriptor is not None
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.truncate(0)
            stream.write(content)
        temporary.replace(place)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        tell_full_disk(error, place.parent)
        raise
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Any) -> None:
    """Write JSON with :func:`write_text`."""
    write_text(file, json.dumps(content, indent=1, default=str) + "\n")
