"""The tensors of the plain model: what quantised tensors stand for, computed when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from shape_moe.architectures.safetensors_file import DTYPE_BITS, TensorSlot, stored_values
from shape_moe.errors import CheckpointError, ShapeMoeError, first_line

if TYPE_CHECKING:
    import torch

Values = Mapping[str, "torch.Tensor"]
Compute = Callable[[Values], "torch.Tensor"]

_DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What parts that do not fit each other make code and libraries raise."""

STORED = "stored"
"""The only part of a tensor that is stored as it is."""


@dataclass(frozen=True)
class PlainTensor:
    """A tensor of the plain model, and what it is computed from.

    Attributes:
        name: its name in an unquantised checkpoint of the model.
        parts: the stored tensors, or rows of them, by what they are to the method; for a tensor that is stored as it
            is, itself as :data:`STORED`.
        shape: its shape; that of the flat tensor where only values would tell it.
        compute: gives the float32 values from those of the parts; None for a tensor that is stored as it is. It
            works on the last dimensions alone where all experts of a layer are stacked.
        read: gives the values of a part.
    """

    name: str
    parts: Mapping[str, TensorSlot]
    shape: tuple[int, ...]
    compute: Compute | None = None
    read: Callable[[TensorSlot], torch.Tensor] = stored_values

    @classmethod
    def stored(cls, slot: TensorSlot) -> PlainTensor:
        """A tensor that is stored as it is."""
        return cls(slot.name, {STORED: slot}, slot.shape)

    @property
    def count(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of its parts."""
        return sum(slot.size for slot in self.parts.values())

    @property
    def is_quantised(self) -> bool:
        """Whether its values are computed."""
        return self.compute is not None

    @property
    def is_matrix(self) -> bool:
        """Whether it has two dimensions or more."""
        return len(self.shape) >= 2

    @property
    def stored_bits(self) -> int | None:
        """Width of the stored numbers, None for a tensor whose values are computed."""
        return None if self.is_quantised else DTYPE_BITS[self.parts[STORED].dtype]

    def row(self, index: int) -> PlainTensor:
        """One row of dimension 0, which all parts must have: one expert of a stack."""
        parts = {part: slot.row(index) for part, slot in self.parts.items()}
        return replace(self, parts=parts, shape=self.shape[1:])

    def values(self) -> torch.Tensor:
        """The values: float32 where they are computed, else in the dtype in which they are stored.

        Raises:
            CheckpointError: when the parts cannot be read, or do not fit each other.
        """
        if self.compute is None:
            return self.read(self.parts[STORED]).clone()  # the last bits of products depend on how memory is aligned
        values = {part: self.read(slot) for part, slot in self.parts.items()}
        try:
            return self.compute(values).contiguous()
        except ShapeMoeError:
            raise
        except _DAMAGE as error:
            shapes = ", ".join(f"{slot.name} {slot.shape}" for slot in self.parts.values())
            raise CheckpointError(
                f"{self.name} cannot be dequantised, its parts do not fit each other ({shapes}): {first_line(error)}"
            ) from error


def joined(
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, PlainTensor],
    combine: Callable[[Values], torch.Tensor],
) -> PlainTensor:
    """A tensor of the plain model that is put together from others.

    Args:
        name: its name.
        shape: its shape.
        tensors: the others, by what they are to ``combine``.
        combine: gives its values from theirs, float32.
    """
    parts = {f"{key} {part}": slot for key, tensor in tensors.items() for part, slot in tensor.parts.items()}

    def compute(values: Values) -> torch.Tensor:
        found = {}
        for key, tensor in tensors.items():
            own = {part: values[f"{key} {part}"] for part in tensor.parts}
            found[key] = own[STORED].float() if tensor.compute is None else tensor.compute(own)
        return combine(found)

    return PlainTensor(name, parts, shape, compute)


def grouped(
    tensors: Mapping[str, TensorSlot], root: str, needed: Iterable[str] = (), optional: Iterable[str] = ()
) -> dict[str, dict[str, TensorSlot]]:
    """The parts of quantised tensors, by the beginning that their names share.

    Args:
        tensors: all tensors.
        root: the ending that makes a tensor a quantised one.
        needed: endings of the other parts that must be there.
        optional: endings of those that may be.

    Returns:
        For every beginning its parts by ending.

    Raises:
        CheckpointError: naming a part that is missing.
    """
    groups = {}
    for name, slot in tensors.items():
        if not name.endswith(root):
            continue
        base = name.removesuffix(root)
        parts = {root: slot}
        for ending in needed:
            if base + ending not in tensors:
                raise CheckpointError(f"{name} is there, but not {base + ending}: download or copy the model again.")
            parts[ending] = tensors[base + ending]
        parts |= {ending: tensors[base + ending] for ending in optional if base + ending in tensors}
        groups[base] = parts
    return groups


def with_the_rest(
    tensors: Mapping[str, TensorSlot], computed: Iterable[PlainTensor], aside: tuple[str, ...] = ()
) -> list[PlainTensor]:
    """The computed tensors and those that are stored as they are.

    Args:
        tensors: all stored tensors.
        computed: the computed ones.
        aside: endings of stored tensors that computing the weights does not need, such as scales of activations.
    """
    done = list(computed)
    used = {slot.name for tensor in done for slot in tensor.parts.values()}
    rest = [
        PlainTensor.stored(slot)
        for name, slot in tensors.items()
        if name not in used and not (aside and name.endswith(aside))
    ]
    return [*rest, *done]
