"""AWQ: whole numbers of 4 bits with a scale and a zero point per group of inputs.

On disk (version ``gemm``): ``X.qweight`` ``[in, out / 8]`` and ``X.qzeros`` ``[in / g, out / 8]`` (32-bit words of
eight outputs, in the order 0 2 4 6 1 3 5 7 from the lowest bits up) and ``X.scales`` ``[in / g, out]``.
``w[o, i] = (q[i, o] - z[i // g, o]) * s[i // g, o]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shape_moe.architectures.quantised.bits import packed_count
from shape_moe.architectures.quantised.method import Config, Quantisation, refused, register, settings_of
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot

if TYPE_CHECKING:
    import torch

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""At which place, counted from the lowest bits, outputs 0 to 7 of a word lie."""
_WEIGHT, _ZEROS, _SCALES = ".qweight", ".qzeros", ".scales"


@register("awq", file="quant_config.json")
def open_awq(config: Config) -> Quantisation:
    """AWQ as its settings describe it."""
    settings = settings_of(config)
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    group = settings.get("group_size", settings.get("q_group_size", -1))
    label = f"AWQ {bits}-bit" + (f", groups of {group}" if isinstance(group, int) and group > 0 else "")
    version = str(settings.get("version", "gemm")).lower()
    if bits != _BITS:
        return refused(label, f"has another width than the {_BITS} bits that are understood")
    if version != "gemm":
        return refused(label, f"of version {version!r} is laid out in a way that is not understood; gemm is")
    return Quantisation(label, _plain)


def _plain(tensors: Mapping[str, TensorSlot]) -> list[PlainTensor]:
    groups = grouped(tensors, _WEIGHT, (_ZEROS, _SCALES))
    return with_the_rest(
        tensors,
        [
            PlainTensor(f"{base}.weight", parts, _shape(parts[_WEIGHT].shape), _dequantise)
            for base, parts in groups.items()
        ],
    )


def _shape(words: tuple[int, ...]) -> tuple[int, ...]:
    """The plain tensor's shape from that of its words."""
    *stack, inputs, outputs = words
    return (*stack, packed_count(outputs, _BITS), inputs)


def _dequantise(values: Values) -> torch.Tensor:
    scales = values[_SCALES].float()
    weight, zeros = _in_order(values[_WEIGHT]), _in_order(values[_ZEROS])
    group = weight.shape[-2] // scales.shape[-2]
    if group * scales.shape[-2] != weight.shape[-2]:
        raise ValueError("the inputs are no whole groups")
    weight = weight.reshape(*scales.shape[:-1], group, scales.shape[-1])
    return ((weight - zeros[..., None, :]) * scales[..., None, :]).flatten(-3, -2).transpose(-1, -2)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    import torch

    shifts = torch.tensor([_BITS * place for place in _PLACES], dtype=torch.int32)
    numbers: torch.Tensor = ((words[..., None] >> shifts) & (2**_BITS - 1)).flatten(-2)
    return numbers
