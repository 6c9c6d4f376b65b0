"""An imatrix of llama.cpp: sums of squares of what every matrix is multiplied with, read, sliced and written.

Two formats. The newer one is a GGUF file (``general.type`` is ``imatrix``): for every matrix ``NAME.in_sum2`` (a row
per expert) and ``NAME.counts``, the tokens that were added up. The older binary one (often ``imatrix.dat``): the number
of entries; for each its name, a number of calls, and for every column the *mean* square times that number; then the
number of chunks and the name of the text. It keeps no tokens per expert; all columns of an expert that no token was
routed to hold the number of calls.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.gguf_file import is_gguf, read_gguf
from shape_moe.errors import CheckpointError, DataError
from shape_moe.selection.selection import Selection

KIND = "imatrix"
SUMS, COUNTS = ".in_sum2", ".counts"
_TYPE, _DATASETS, _CHUNKS, _CHUNK_SIZE = (
    "general.type",
    "imatrix.datasets",
    "imatrix.chunk_count",
    "imatrix.chunk_size",
)
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down|gate_up)_exps\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_MOST_ENTRIES, _LONGEST_NAME = 1_000_000, 1000


@dataclass(frozen=True)
class Entry:
    """What is known of one matrix.

    Attributes:
        sums: float32 [n, columns], a row for every expert that the matrix stacks, one for others: sums of squares, or
            in the older format means times :attr:`counts`.
        counts: float32 [n], tokens; in the older format [1], the number of calls.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]


@dataclass(frozen=True)
class Imatrix:
    """An imatrix.

    Attributes:
        entries: by name of the matrix.
        datasets: names of the texts that it was made from.
        chunks: how many chunks of text.
        chunk_size: tokens per chunk, 0 where that is not known.
        legacy: whether it has the older format.
    """

    entries: dict[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    legacy: bool = False

    @property
    def suffix(self) -> str:
        """How a file of its format is called."""
        return ".dat" if self.legacy else ".gguf"

    def experts(self, layer: int, part: str, num_experts: int) -> Entry | None:
        """The entry of a stack of experts with a row for each; None where there is none.

        Args:
            layer: decoder layer.
            part: ``gate``, ``up``, ``down`` or ``gate_up``.
            num_experts: how many there are.

        Raises:
            DataError: when it is of another number of experts.
        """
        name = f"blk.{layer}.ffn_{part}_exps.weight"
        entry = self.entries.get(name)
        return None if entry is None else by_expert(name, entry, num_experts)


def by_expert(name: str, entry: Entry, num_experts: int) -> Entry:
    """An entry with a row for every expert.

    Raises:
        DataError: when it is of another number of experts.
    """
    if entry.sums.size % num_experts or len(entry.counts) not in (1, num_experts):
        rows = len(entry.counts) if len(entry.counts) > 1 else entry.sums.size
        raise DataError(f"The imatrix is of another model: {name} has {rows} rows, not one for {num_experts} experts.")
    return replace(entry, sums=entry.sums.reshape(num_experts, -1))


def is_imatrix(file: Path) -> bool:
    """Whether a file is an imatrix, by its content."""
    if not file.is_file():
        return False
    if is_gguf(file):
        try:
            return read_gguf(file).metadata.get(_TYPE) == KIND
        except CheckpointError:
            return False
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            return False
        entries, length = struct.unpack("<ii", head)
        if not (0 < entries <= _MOST_ENTRIES and 0 < length <= _LONGEST_NAME):
            return False
        name = stream.read(length)
    return len(name) == length and re.fullmatch(rb"[\w.\-]+\.weight", name) is not None


def read_imatrix(file: Path) -> Imatrix:
    """Read an imatrix of either format.

    Raises:
        DataError: when it is none, or damaged.
    """
    if not is_imatrix(file):
        raise DataError(f"{file} is no imatrix of llama.cpp.")
    found = _read_gguf(file) if is_gguf(file) else _read_legacy(file)
    for name, entry in found.entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all() and (entry.counts >= 0).all()):
            raise DataError(f"{file}: {name} holds numbers that are not finite, or counts below 0.")
        if (entry.sums < 0).any():
            raise DataError(f"{file}: {name} holds sums of squares below 0.")
    return found


def _read_gguf(file: Path) -> Imatrix:
    header = read_gguf(file)
    values: dict[str, NDArray[np.float32]] = {}
    with file.open("rb") as stream:
        for tensor in header.tensors.values():
            if tensor.type_name != "F32":
                raise DataError(f"{file}: {tensor.name} is stored as {tensor.type_name}; an imatrix holds F32.")
            stream.seek(tensor.start)
            values[tensor.name] = np.frombuffer(stream.read(tensor.size), dtype="<f4").reshape(tensor.shape)
    entries = {}
    for name in [name.removesuffix(SUMS) for name in values if name.endswith(SUMS)]:
        sums, counts = values[name + SUMS], values.get(name + COUNTS)
        if counts is None or (counts.size > 1 and sums.size % counts.size):
            raise DataError(f"{file}: {name} has no counts that fit its sums: the file is damaged.")
        rows = max(counts.size, 1)
        entries[name] = Entry(sums.reshape(rows, -1) if rows > 1 else np.atleast_2d(sums), counts.reshape(-1))
    if not entries:
        raise DataError(f"{file} holds no entries.")
    metadata = header.metadata
    datasets = tuple(str(name) for name in metadata.get(_DATASETS) or ())
    return Imatrix(entries, datasets, _number(metadata.get(_CHUNKS)), _number(metadata.get(_CHUNK_SIZE)))


def _number(value: Any) -> int:
    return value if type(value) is int else 0


class _Bytes:
    """Reads a binary file front to back."""

    def __init__(self, file: Path) -> None:
        self.file, self.content, self.position = file, file.read_bytes(), 0

    def take(self, size: int) -> bytes:
        part = self.content[self.position : self.position + size]
        if size < 0 or len(part) != size:
            raise DataError(f"{self.file} ends too early, or is damaged.")
        self.position += size
        return part

    def number(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    @property
    def left(self) -> int:
        return len(self.content) - self.position


def _read_legacy(file: Path) -> Imatrix:
    stream, entries = _Bytes(file), {}
    for _ in range(stream.number()):
        name = stream.take(stream.number()).decode("utf-8", "replace")
        calls, size = stream.number(), stream.number()
        sums = np.frombuffer(stream.take(4 * size), dtype="<f4").reshape(1, -1)
        entries[name] = Entry(sums, np.array([calls], dtype=np.float32))
    chunks, datasets = 0, []
    if stream.left >= 4:
        chunks = stream.number()
    if stream.left >= 4:
        datasets = [stream.take(stream.number()).decode("utf-8", "replace")]
    return Imatrix(entries, tuple(name for name in datasets if name), chunks, legacy=True)


def sliced(imatrix: Imatrix, selection: Selection, num_layers: int) -> Imatrix:
    """The imatrix of a pruned model: rows of kept experts, all other entries as they are.

    Args:
        imatrix: of the original.
        selection: what is kept, the same number in every layer.
        num_layers: decoder layers of the original; entries of layers behind them, which only draft, are left out.

    Raises:
        DataError: when it is of another model.
    """
    entries: dict[str, Entry] = {}
    seen = False
    for name, entry in imatrix.entries.items():
        inside = _LAYER.match(name)
        if inside is not None and int(inside[1]) >= num_layers:
            continue
        match = _EXPERTS.fullmatch(name)
        kept = selection.layers.get(int(match[1])) if match is not None else None
        if kept is None:
            entries[name] = entry
            continue
        seen = True
        whole = by_expert(name, entry, selection.num_experts)
        counts = whole.counts[kept] if len(whole.counts) > 1 else whole.counts
        rows = whole.sums[kept]
        entries[name] = Entry(rows if len(counts) > 1 else rows.reshape(1, -1), counts)
    if not seen:
        raise DataError("The imatrix is of another model: it holds no experts of the layers that are pruned.")
    return replace(imatrix, entries=entries)


def write_imatrix(imatrix: Imatrix, file: Path) -> None:
    """Write an imatrix in the format that it was read from."""
    if imatrix.legacy:
        _write_legacy(imatrix, file)
        return
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), arch="")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type(KIND)
    writer.add_array(_DATASETS, list(imatrix.datasets))
    writer.add_uint32(_CHUNKS, imatrix.chunks)
    writer.add_uint32(_CHUNK_SIZE, imatrix.chunk_size)
    for name, entry in imatrix.entries.items():
        rows = len(entry.counts)
        writer.add_tensor(name + SUMS, np.ascontiguousarray(entry.sums.reshape(rows, -1)))
        writer.add_tensor(name + COUNTS, np.ascontiguousarray(entry.counts.reshape(rows, 1)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_legacy(imatrix: Imatrix, file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(struct.pack("<i", len(imatrix.entries)))
        for name, entry in imatrix.entries.items():
            stream.write(struct.pack("<i", len(name.encode())) + name.encode())
            stream.write(struct.pack("<ii", int(entry.counts[0]), entry.sums.size))
            stream.write(np.ascontiguousarray(entry.sums, dtype="<f4").tobytes())
        stream.write(struct.pack("<i", imatrix.chunks))
        text = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
        stream.write(struct.pack("<i", len(text)) + text)
