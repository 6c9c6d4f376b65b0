"""Tensors read from disk straight into memory of their own, each byte once, and counted."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING

from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.architectures.weight_source import WeightSource
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

    Attributes:
        bytes_read: bytes of tensors read so far.
    """

    def __init__(self, source: WeightSource) -> None:
        self.source, self.bytes_read = source, 0
        self._as_stored = "quantization_config" not in source.config

    def read(self, slots: Iterable[TensorSlot]) -> dict[str, torch.Tensor]:
        """The values of tensors by name, dequantised where they are quantised.

        Raises:
            CheckpointError: when a file is shorter than it was, or of a dtype that torch cannot compute with.
        """
        tensors = {}
        for slot in sorted(slots, key=attrgetter("file", "start")):
            stored = self._as_stored and slot.dtype in _TORCH_NAMES
            tensors[slot.name] = _stored(slot) if stored else self.source.values(slot, "dequantised")
            self.bytes_read += slot.size
        return tensors


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
