"""FP8: float8 weights with one scale per block of rows and columns, per row, or per tensor.

On disk: ``X.weight`` (``[out, in]``, or ``[E, out, in]`` where experts are stacked) beside ``X.weight_scale_inv``
(one scale per block, as DeepSeek and Qwen publish) or ``X.weight_scale`` (per tensor or per row, as vLLM's tools
write). Despite its name, ``weight_scale_inv`` multiplies too: ``w = q * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from shape_moe.architectures.quantised.method import Config, Quantisation, register, settings_of
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_BLOCK_SCALE, _SCALE, _WEIGHT = "_scale_inv", "_scale", ""
_KINDS = frozenset({"F8_E4M3", "F8_E5M2"})
ACTIVATION_SCALES = (".input_scale", ".activation_scale", "_activation_scale")


@register("fp8")
def open_fp8(config: Config) -> Quantisation:
    """FP8 as its settings describe it."""
    settings = settings_of(config)
    block = settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise CheckpointError(f"quantization_config: weight_block_size must be two whole numbers, not {block!r}.")
    shape = f", blocks of {block[0]} x {block[1]}" if block else ""
    return Quantisation(f"FP8{shape}", partial(plain_fp8, block=tuple(block) if block else None))


@register("fbgemm_fp8")
def open_fbgemm(config: Config) -> Quantisation:
    """FP8 with one scale per row."""
    del config
    return Quantisation("FP8, a scale per row", partial(plain_fp8, block=None))


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)


def plain_fp8(tensors: Mapping[str, TensorSlot], block: tuple[int, int] | None) -> list[PlainTensor]:
    """What FP8 tensors stand for."""
    computed = []
    for scale in (_BLOCK_SCALE, _SCALE):
        for base, parts in grouped(tensors, scale, optional=(_WEIGHT,)).items():
            weight = parts.get(_WEIGHT)
            if weight is None or weight.dtype not in _KINDS:
                continue  # scales of other things than weights: of a KV cache, of activations
            side = block if scale == _BLOCK_SCALE else None
            compute = partial(dequantise, scale=scale, block=side)
            computed.append(PlainTensor(base, parts, weight.shape, compute))
    return with_the_rest(tensors, computed, ACTIVATION_SCALES)


def dequantise(values: Values, *, scale: str, block: tuple[int, int] | None) -> torch.Tensor:
    """``w = q * scale``, each scale for its block; the last block of a row or column may be smaller."""
    import torch

    from shape_moe.architectures.quantised.fp4 import powers_of_two

    weight, scales = values[_WEIGHT].float(), values[scale]
    scales = powers_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
    if scale == _BLOCK_SCALE and scales.ndim >= 2:
        rows, columns = weight.shape[-2:]
        side = block or (-(-rows // scales.shape[-2]), -(-columns // scales.shape[-1]))
        grid = (-(-rows // side[0]), -(-columns // side[1]))
        if tuple(scales.shape[-2:]) != grid:
            raise ValueError(f"scales of {grid[0]} x {grid[1]} blocks are expected")
        scales = scales.repeat_interleave(side[0], -2).repeat_interleave(side[1], -1)[..., :rows, :columns]
    elif scales.numel() == 1 and weight.ndim == 2:
        scales = scales.reshape(())
    else:
        scales = scales.reshape(*scales.shape, *[1] * (weight.ndim - scales.ndim))
    return weight * scales
