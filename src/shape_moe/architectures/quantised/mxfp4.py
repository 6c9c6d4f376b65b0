"""MXFP4 as gpt-oss stores its experts: four-bit floats in blocks of 32 that share a power of two.

On disk: ``X_blocks`` ``[E, out, in / 32, 16]`` (bytes, two values each) and ``X_scales`` ``[E, out, in / 32]`` (biased
exponents), where ``X`` is ``gate_up_proj`` or ``down_proj``; the plain tensor is ``[E, in, out]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shape_moe.architectures.quantised.fp4 import powers_of_two, unpacked_fp4
from shape_moe.architectures.quantised.method import Config, Quantisation, register
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot

if TYPE_CHECKING:
    import torch

_BLOCKS, _SCALES = "_blocks", "_scales"


@register("mxfp4")
def open_mxfp4(config: Config) -> Quantisation:
    """MXFP4 experts."""
    del config
    return Quantisation("MXFP4", _plain)


def _plain(tensors: Mapping[str, TensorSlot]) -> list[PlainTensor]:
    groups = grouped(tensors, _BLOCKS, (_SCALES,))
    computed = [PlainTensor(base, parts, _shape(parts[_BLOCKS].shape), _dequantise) for base, parts in groups.items()]
    return with_the_rest(tensors, computed)


def _shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The plain tensor's shape from that of its blocks."""
    *experts, rows, count, size = blocks
    return (*experts, 2 * count * size, rows)


def _dequantise(values: Values) -> torch.Tensor:
    import torch

    weight = unpacked_fp4(values[_BLOCKS]) * powers_of_two(values[_SCALES].view(torch.uint8))[..., None]
    return weight.flatten(-2).transpose(-1, -2)
