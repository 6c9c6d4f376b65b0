"""The safetensors format as byte ranges: a validated header, no tensor library needed.

Format: eight bytes (little-endian) give the length of a JSON header, which maps tensor names to dtype, shape and
byte offsets behind the header. Source: the format description of the ``safetensors`` project.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.errors import CheckpointError, first_line
from shape_moe.json_file import parse_json

if TYPE_CHECKING:
    import torch

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "F4": 4,
}
_MAX_HEADER_BYTES = 100_000_000
_MAX_NAME = 1000
_MAX_DIMENSIONS = 16
_MAX_NUMBER = 2**62
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies: ``size`` bytes from ``start`` (counted from the beginning of ``file``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def row(self, index: int) -> TensorSlot:
        """One row of dimension 0, without that dimension."""
        size = self.size // self.shape[0]
        return replace(self, shape=self.shape[1:], start=self.start + index * size, size=size)

    def read(self) -> bytes:
        """The raw bytes."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.size)


def byte_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this dtype and shape takes on disk."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def read_header(file: Path) -> tuple[dict[str, TensorSlot], dict[str, str]]:
    """Read and check a file's header.

    Returns:
        The tensors by name, in the order of their offsets, and the file's metadata.

    Raises:
        CheckpointError: when the file is missing, truncated or its header is not consistent with its size.
    """
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if total < 8 or length > min(total - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is not a complete safetensors file: download or copy it again.")
            header = parse_json(stream.read(length), f"The safetensors header of {file}")
    except FileNotFoundError as error:
        if file.is_symlink():
            raise CheckpointError(
                f"{file} is a link to {file.readlink()}, which is not there: the download is incomplete; "
                "download or copy the model again."
            ) from error
        raise CheckpointError(f"{file} is missing: download or copy the model again.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has no readable safetensors header: download or copy it again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: the header's __metadata__ is not a table of texts.")
    slots = [_slot(file, name, entry, 8 + length) for name, entry in header.items()]
    slots.sort(key=lambda slot: (slot.start, slot.size))
    _check_layout(file, slots, 8 + length, total)
    return {slot.name: slot for slot in slots}, metadata


def _slot(file: Path, name: str, entry: Any, base: int) -> TensorSlot:
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise CheckpointError(f"{file}: the header names a tensor {name[:40]!r}, which is not a name.")
    try:
        dtype, shape, offsets = entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"])
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: the header entry of tensor {name!r} is malformed.") from error
    if not isinstance(dtype, str) or len(shape) > _MAX_DIMENSIONS or len(offsets) != 2 or not _whole(shape + offsets):
        raise CheckpointError(f"{file}: the header entry of tensor {name!r} is malformed.")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: tensor {name!r} has the unknown dtype {dtype[:40]!r}.")
    begin, end = offsets
    if min(0, begin, *shape) < 0 or end - begin != byte_size(dtype, shape):
        raise CheckpointError(f"{file}: tensor {name!r} does not have the size that its shape {shape} says.")
    return TensorSlot(name, dtype, shape, file, base + begin, end - begin)


def _whole(numbers: tuple[Any, ...]) -> bool:
    return all(type(n) is int and abs(n) < _MAX_NUMBER for n in numbers)


def _check_layout(file: Path, slots: list[TensorSlot], base: int, total: int) -> None:
    position = base
    for slot in slots:
        if slot.start != position:
            raise CheckpointError(f"{file}: tensor {slot.name!r} overlaps its neighbour or leaves a gap.")
        position += slot.size
    if position != total:
        raise CheckpointError(
            f"{file} has {total:,} bytes where its header says {position:,}: it is truncated or damaged; "
            "download or copy it again."
        )


def make_header(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The header (with its length prefix) of a file that holds ``tensors`` one after the other.

    Args:
        tensors: dtype and shape by name, in the order in which the bytes will follow.
        metadata: free text entries.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + byte_size(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def stored_values(slot: TensorSlot) -> torch.Tensor:
    """The values of a tensor in the dtype in which they are stored.

    Raises:
        CheckpointError: for a dtype that torch does not have.
    """
    from safetensors.torch import load

    try:
        content = make_header({slot.name: (slot.dtype, slot.shape)}, {}) + slot.read()
        tensor: torch.Tensor = load(content)[slot.name]
    except Exception as error:  # the library has an error type of its own
        raise CheckpointError(f"{slot.file}: the values of {slot.name} cannot be read: {first_line(error)}") from error
    return tensor
