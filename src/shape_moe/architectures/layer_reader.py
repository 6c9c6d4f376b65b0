"""Tensors read from disk straight into memory of their own, each byte once, and counted."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from shape_moe.architectures.plain_model import is_stored_plain
from shape_moe.architectures.quantised.plain import STORED, PlainTensor
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_LINE = 64
"""Bytes of a cache line, to which torch aligns tensors."""
_OWN_PAGES = 2**18
"""Tensors of at least so many bytes get pages of their own, which go back to the system as soon as they are free; the
allocator would keep those of the sizes that experts have for later."""


class WeightReader:
    """Reads tensors of a model and counts what it has read.

    Args:
        source: the model.
        dtype: in which dtype dequantised experts are kept, None for float32.

    Attributes:
        bytes_read: bytes of tensors read so far.
    """

    def __init__(self, source: Snapshot, dtype: torch.dtype | None = None) -> None:
        self.source, self.dtype, self.bytes_read = source, dtype, 0
        self._as_stored = is_stored_plain(source)

    def read(self, tensors: Iterable[PlainTensor]) -> dict[str, torch.Tensor]:
        """The values of tensors of the plain model by name.

        Raises:
            CheckpointError: when a file is shorter than it was, or of a dtype that torch cannot compute with.
        """
        found = {}
        for tensor in sorted(tensors, key=_place):
            slot = tensor.parts.get(STORED)
            if self._as_stored and slot is not None and slot.dtype in _TORCH_NAMES:
                found[tensor.name] = _stored(slot)
            else:
                found[tensor.name] = self._computed(tensor)
            self.bytes_read += tensor.size
        return found

    def _computed(self, tensor: PlainTensor) -> torch.Tensor:
        """Computed values; experts at once in the dtype in which they run, since float32 takes twice the memory."""
        values = tensor.values()
        is_expert = self.source.role(tensor.name).role in ("expert", "packed")
        return values.to(self.dtype) if is_expert and self.dtype is not None else values


def _place(tensor: PlainTensor) -> tuple[str, int]:
    """Where a tensor, or the first of its parts, lies."""
    return min((str(slot.file), slot.start) for slot in tensor.parts.values())


def _stored(slot: TensorSlot) -> torch.Tensor:
    """The values of a tensor as they are stored, at an address like that in the file.

    A loader of whole models maps files into memory, and the last bits of a product may depend on how its factors are
    aligned: on the same alignment they are the same.
    """
    import torch

    dtype = getattr(torch, _TORCH_NAMES[slot.dtype])
    shift = slot.start % _LINE
    if slot.start % dtype.itemsize:
        shift = 0
    if slot.size < _OWN_PAGES:
        place = torch.empty(slot.size + _LINE, dtype=torch.uint8)
    else:
        place = torch.frombuffer(mmap.mmap(-1, slot.size + _LINE), dtype=torch.uint8)
    raw = place[shift : shift + slot.size]
    view = raw.numpy().data
    with slot.file.open("rb", buffering=0) as stream:
        stream.seek(slot.start)
        done = 0
        while done < slot.size:
            count = stream.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{slot.file} has become shorter while it was read.")
            done += count
    return raw.view(dtype).view(slot.shape)
