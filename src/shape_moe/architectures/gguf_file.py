"""The GGUF format as metadata and byte ranges: a validated header, no weight is read.

Format (little-endian): magic, version, number of tensors, number of metadata entries; the entries (key, type, value);
the tensors (name, dimensions with the fastest first, type, offset); then, aligned, the tensors' bytes. Source: the
format description of the ``ggml`` project. Block sizes of quantised types are the ``gguf`` package's.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shape_moe.errors import CheckpointError, first_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of each scalar type of metadata, and its letter for :mod:`struct`."""
_MAX_NAME = 1000
_MAX_DIMENSIONS = 8
_PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Entry:
    """One entry of metadata.

    Attributes:
        key: its key.
        kind: number of its type.
        value: number, text, truth value or list of such.
        raw: its bytes in the file, key and type included.
    """

    key: str
    kind: int
    value: Any
    raw: bytes


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: its name.
        type_name: its type, ``Q4_K`` say.
        shape: the slowest dimension first, as Transformers has it.
        file: the file.
        start: of its bytes, counted from the beginning of the file.
        size: bytes.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """What one file says of itself.

    Attributes:
        file: the file.
        version: of the format.
        entries: metadata by key, in file order.
        tensors: the tensors by name, in file order.
        data_start: where the tensors' bytes begin.
    """

    file: Path
    version: int
    entries: dict[str, Entry]
    tensors: dict[str, GgufTensor]
    data_start: int

    @property
    def metadata(self) -> dict[str, Any]:
        """The values of all entries."""
        return {key: entry.value for key, entry in self.entries.items()}

    @property
    def alignment(self) -> int:
        """Bytes to a multiple of which every tensor begins."""
        return int(self.entries[ALIGNMENT_KEY].value) if ALIGNMENT_KEY in self.entries else DEFAULT_ALIGNMENT


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its first bytes (an unreadable or foreign file is none)."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def part_files(file: Path) -> list[Path]:
    """The files of a model, by the name of one: itself, or all parts of a split one, in order."""
    match = _PART.match(file.name)
    if match is None:
        return [file]
    return [file.with_name(f"{match[1]}-{part:05d}-of-{match[3]}.gguf") for part in range(1, int(match[3]) + 1)]


def read_gguf(file: Path) -> GgufHeader:
    """Read and check a file's header.

    Raises:
        CheckpointError: when the file is missing, truncated, not GGUF, or its header contradicts itself.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(file, content).header()
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: download or copy it again.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: the GGUF header holds a text that is not UTF-8.") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CheckpointError(f"{file} cannot be read as GGUF: {first_line(error)}") from error


def read_parts(file: Path) -> list[GgufHeader]:
    """Read a model of one file, or of all files that it was split into, in order, whichever of them is named.

    Raises:
        CheckpointError: when a part is missing or damaged, or a tensor is in two of them.
    """
    header = read_gguf(file)
    count = header.metadata.get(SPLIT_COUNT, 1)
    if count == 1:
        return [header]
    match = _PART.match(file.name)
    if type(count) is not int or match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{file} is one of {count} parts of a split model, and is not named as such (NAME-00001-of-0000N.gguf): "
            "give the parts their names back."
        )
    headers = [header if part == file else read_gguf(part) for part in part_files(file)]
    for number, part in enumerate(headers):
        if part.metadata.get(SPLIT_NUMBER) != number or part.metadata.get(SPLIT_COUNT) != count:
            raise CheckpointError(f"{part.file} is not part {number + 1} of {count} of the model: its header differs.")
    names = [name for part in headers for name in part.tensors]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{file}: a tensor is in two parts of the model.")
    promised = headers[0].metadata.get(SPLIT_TENSORS, len(names))
    if promised != len(names):
        raise CheckpointError(f"{file}: the parts hold {len(names)} tensors where {promised} are promised.")
    return headers


class _Reader:
    """Reads a mapped file front to back; every length is checked against what is left of the file."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self.file, self.content, self.total, self.position = file, content, len(content), 0

    def header(self) -> GgufHeader:
        if self._bytes(4) != MAGIC:
            raise CheckpointError(f"{self.file} is not a GGUF file.")
        version = self._number("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.file} has GGUF version {version}; versions 2 and 3 (little-endian) are read.")
        tensors, entries = self._number("Q"), self._number("Q")
        if max(tensors, entries) > self.total // 8:
            raise self._damaged("counts more tensors or entries than the file can hold")
        metadata = self._entries(entries)
        alignment = metadata[ALIGNMENT_KEY].value if ALIGNMENT_KEY in metadata else DEFAULT_ALIGNMENT
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"has {ALIGNMENT_KEY} {alignment!r}, which is not a power of two")
        described = [self._tensor() for _ in range(tensors)]
        start = -(-self.position // alignment) * alignment
        found = {name: self._placed(name, shape, kind, start + at) for name, shape, kind, at in described}
        if len(found) != tensors:
            raise self._damaged("names a tensor twice")
        self._check_overlap(sorted(found.values(), key=lambda tensor: tensor.start))
        return GgufHeader(self.file, version, metadata, found, start)

    def _entries(self, count: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for _ in range(count):
            begin = self.position
            key, kind = self._text(_MAX_NAME), self._number("I")
            value = self._value(kind)
            if key in entries:
                raise self._damaged(f"has the key {key} twice")
            entries[key] = Entry(key, kind, value, self.content[begin : self.position])
        return entries

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY or depth > 2:
            raise self._damaged(f"holds an entry of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            size = struct.calcsize(f"<{SCALARS[inner]}")
            self._check(count * size)
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self._bytes(count * size)))
        self._check(count * 8)
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(_MAX_NAME), self._number("I")
        if not name.isprintable() or not name or dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"names a tensor {name[:40]!r} of {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        return name, shape, self._number("I"), self._number("Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        known = block_sizes().get(kind)
        if known is None:
            raise CheckpointError(
                f"{self.file}: tensor {name} has the type {kind}, which this version of the gguf package does not know."
            )
        type_name, per_block, block_bytes = known
        values = math.prod(shape)
        if values < 1 or values > 8 * self.total * per_block or (shape[-1:] and shape[-1] % per_block):
            raise self._damaged(f"gives tensor {name} the shape {shape}, which is none of type {type_name}")
        size = values // per_block * block_bytes
        if start + size > self.total:
            raise CheckpointError(
                f"{self.file} ends before tensor {name} does: it is truncated; download or copy it again."
            )
        return GgufTensor(name, type_name, shape, self.file, start, size)

    def _check_overlap(self, tensors: Sequence[GgufTensor]) -> None:
        end = 0
        for tensor in tensors:
            if tensor.start < end:
                raise self._damaged(f"lets tensor {tensor.name} overlap its neighbour")
            end = tensor.start + tensor.size

    def _text(self, most: int | None = None) -> str:
        length = self._number("Q")
        if most is not None and length > most:
            raise self._damaged(f"has a name of {length} bytes")
        return self._bytes(length).decode("utf-8")

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._bytes(struct.calcsize(f"<{letter}")))[0]

    def _bytes(self, count: int) -> bytes:
        self._check(count)
        begin, self.position = self.position, self.position + count
        return self.content[begin : self.position]

    def _check(self, count: int) -> None:
        if count > self.total - self.position:
            raise CheckpointError(f"{self.file} ends within its header: it is truncated; download or copy it again.")

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: the GGUF header {what}: it is damaged; download or copy it again.")


@cache
def block_sizes() -> dict[int, tuple[str, int, int]]:
    """Name, values per block and bytes per block of every tensor type, by its number."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *map(int, sizes)) for kind, sizes in GGML_QUANT_SIZES.items()}


@cache
def type_numbers() -> dict[str, int]:
    """The number of every tensor type, by its name."""
    return {name: kind for kind, (name, _, _) in block_sizes().items()}


def encode_text(text: str) -> bytes:
    """A text as the format has it: length, then UTF-8."""
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def make_entry(key: str, kind: int, value: Any) -> Entry:
    """An entry of metadata, with its bytes.

    Args:
        key: its key.
        kind: number of a scalar type, or of texts.
        value: its value.
    """
    content = encode_text(value) if kind == STRING else struct.pack(f"<{SCALARS[kind]}", value)
    return Entry(key, kind, value, encode_text(key) + struct.pack("<I", kind) + content)


def make_header(
    entries: Sequence[Entry], tensors: Sequence[tuple[str, str, tuple[int, ...], int]], align: int
) -> bytes:
    """The header of a file, up to where the tensors' bytes begin.

    Args:
        entries: metadata, in order.
        tensors: name, type, shape (slowest dimension first) and size of every tensor, in the order of their bytes.
        align: bytes to a multiple of which every tensor begins.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(entries)), *(entry.raw for entry in entries)]
    for (name, kind, shape, _), offset in zip(tensors, offsets([size for *_, size in tensors], align), strict=True):
        parts += [encode_text(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *reversed(shape))]
        parts.append(struct.pack("<IQ", type_numbers()[kind], offset))
    content = b"".join(parts)
    return content + bytes(-len(content) % align)


def offsets(sizes: Sequence[int], align: int) -> Iterator[int]:
    """Where tensors of these sizes begin, one after the other, counted from where the first does."""
    position = 0
    for size in sizes:
        yield position
        position += -(-size // align) * align
