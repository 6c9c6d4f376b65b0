"""The files that a job reads, recorded so that a change of any of them shows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from shape_moe.architectures.gguf_file import part_files
from shape_moe.errors import ShapeMoeError

SMALL = 16 * 2**20
"""Files up to this many bytes are hashed whole; of larger ones a sample is."""
_SAMPLES, _SAMPLE = 16, 4096
_LARGEST_HEADER = 100_000_000
_MODEL_FILES = ("*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "vocab.*", "merges.txt")
"""What loaders read of a model's folder; other files there (notes, logs) may change while a job runs."""

_TRACE_FILES = ("trace.json", "statistics.safetensors", "coalitions/*.parquet")
"""What a trace consists of; what else lies in its folder (selections, reports) is none of it."""


@dataclass(frozen=True)
class SourceFile:
    """What is known of a file without reading all of it.

    Attributes:
        size: bytes.
        mtime_ns: when its content was changed, in nanoseconds.
        ctime_ns: when the file system changed anything of it.
        inode: its number in the file system; another one is another file under the same name.
        digest: ``sha256:...`` over the whole file where it is small, ``sampled:...`` over evenly spaced blocks of it
            where it is not.
        header: sha256 of a safetensors file's header, None for other files.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    digest: str
    header: str | None = None

    @property
    def state(self) -> tuple[int, int, int, int]:
        """What the file system says of it."""
        return self.size, self.mtime_ns, self.ctime_ns, self.inode

    def difference(self, now: SourceFile) -> str | None:
        """What has changed, in words; None where the file is the same.

        Whole files of equal content are the same whatever their times. Of a sampled file, anything counts.
        """
        if self.state == now.state:
            return None
        if difference := self.difference_of_copies(now):
            return difference
        if self.digest.startswith("sha256:"):
            return None
        names = ("size", "time of change", "time of change", "inode")
        return next(name for name, old, new in zip(names, self.state, now.state, strict=True) if old != new)

    def difference_of_copies(self, other: SourceFile) -> str | None:
        """What differs between two files that may lie in different places: what they hold, as far as it was read."""
        for name in ("size", "header", "digest"):
            if getattr(self, name) != getattr(other, name):
                return "content" if name == "digest" else name
        return None


def describe_file(file: Path) -> SourceFile:
    """Record a file (where it is a link, the file that it points to).

    Raises:
        OSError: when it cannot be read.
    """
    found = file.stat()
    return _described(file, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@lru_cache(maxsize=4096)
def _described(file: Path, size: int, mtime_ns: int, ctime_ns: int, inode: int) -> SourceFile:
    """Record a file; in one state it is read once."""
    with file.open("rb") as stream:
        header = None
        if file.suffix == ".safetensors":
            length = int.from_bytes(stream.read(8), "little")
            header = sha256(stream.read(min(length, _LARGEST_HEADER)))
            stream.seek(0)
        if size <= SMALL:
            digest = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        else:
            blocks = hashlib.sha256()
            for i in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE) * i // (_SAMPLES - 1))
                blocks.update(stream.read(_SAMPLE))
            digest = f"sampled:{blocks.hexdigest()}"
    return SourceFile(size, mtime_ns, ctime_ns, inode, digest, header)


def describe_inputs(inputs: Iterable[str | os.PathLike[str]]) -> dict[str, SourceFile]:
    """Record every file of a job's inputs, by its absolute path; names that do not exist (hub names) are left out."""
    found = {}
    for given in inputs:
        for file in _files(Path(given).absolute()):
            found[str(file)] = describe_file(file)
    return found


def changed_file(before: Mapping[str, SourceFile], now: Mapping[str, SourceFile]) -> str | None:
    """The first file that is another one now, and what of it has changed; None where all are the same."""
    for name, known in before.items():
        if name not in now:
            return f"{name} is gone"
        if (what := known.difference(now[name])) is not None:
            return f"{name} has changed ({what})"
    added = sorted(set(now) - set(before))
    return f"{added[0]} was added" if added else None


def changed_since(before: Mapping[str, SourceFile], inputs: Iterable[str | os.PathLike[str]]) -> str | None:
    """As :func:`changed_file`, within one run: what was read may not even have been touched.

    No content is read: what the file system says decides.
    """
    now = {str(file): file for given in inputs for file in _files(Path(given).absolute())}
    for name, known in before.items():
        try:
            found = Path(name).stat()
        except FileNotFoundError:
            return f"{name} is gone"
        if known.state != _state(found):
            return f"{name} has changed"
    added = sorted(set(now) - set(before))
    return f"{added[0]} was added" if added else None


class WatchedFiles:
    """Files that must stay as they are while something is made from them.

    Args:
        inputs: files and folders; None and names that do not exist (hub names) are left out.
    """

    def __init__(self, inputs: Iterable[str | os.PathLike[str] | None]) -> None:
        given = [Path(path).absolute() for path in inputs if path is not None]
        self._before = {file: _state(file.stat()) for path in given for file in _files(path)}

    def check(self) -> None:
        """Check that none of them has changed, by what the file system says; files that were added do not matter.

        Raises:
            ShapeMoeError: naming the first that has.
        """
        for file, before in self._before.items():
            try:
                what = None if _state(file.stat()) == before else "has changed"
            except FileNotFoundError:
                what = "is gone"
            if what is not None:
                raise ShapeMoeError(
                    f"{file} {what} while it was read, so the result would mix two states of it; run the command again."
                )


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def is_one_of(file: Path, inputs: Iterable[str | os.PathLike[str]]) -> bool:
    """Whether a file is one of a job's inputs, or of the files of one, by whatever name."""
    place = file.resolve()
    return any(place == found.resolve() for given in inputs for found in _files(Path(given).absolute()))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield from (part for part in part_files(path) if part.is_file())
    elif (path / "config.json").is_file():
        yield from _files_of_model(path)
    elif (path / "trace.json").is_file():
        yield from (file for name in _TRACE_FILES for file in sorted(path.glob(name)))
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
                yield file


def _files_of_model(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _MODEL_FILES):
            yield file


def sha256(content: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
