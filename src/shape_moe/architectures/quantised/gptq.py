"""GPTQ: whole numbers of 2, 3, 4 or 8 bits with a scale and a zero point per group of inputs.

On disk: ``X.qweight`` ``[in * b / 32, out]`` (a stream of bits down the inputs), ``X.qzeros``
``[groups, out * b / 32]`` (along the outputs), ``X.scales`` ``[groups, out]`` and ``X.g_idx`` ``[in]``, the group of
every input; with ``desc_act`` groups are not consecutive. ``w[o, i] = (q[i, o] - z[g(i), o]) * s[g(i), o]``. Zero
points are stored less one, but for the checkpoint format ``gptq_v2``, which stores them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from shape_moe.architectures.quantised.bits import packed_count, unpacked
from shape_moe.architectures.quantised.method import Config, Quantisation, refused, register, settings_of
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot

if TYPE_CHECKING:
    import torch

_WIDTHS = (2, 3, 4, 8)
_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point, by checkpoint format."""
_WEIGHT, _ZEROS, _SCALES, _GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"


@register("gptq", file="quantize_config.json")
def open_gptq(config: Config) -> Quantisation:
    """GPTQ as its settings describe it."""
    settings = settings_of(config)
    bits, group = settings.get("bits"), int(settings.get("group_size") or -1)  # some write it as a text
    label = f"GPTQ {bits}-bit" + (f", groups of {group}" if group > 0 else "")
    form = settings.get("checkpoint_format") or "gptq"
    if bits not in _WIDTHS:
        return refused(label, f"has another width than those that are understood ({', '.join(map(str, _WIDTHS))})")
    if form not in _OFFSETS:
        return refused(
            label, f"in the checkpoint format {form!r} is laid out for one kernel; gptq and gptq_v2 are read"
        )
    if settings.get("pack_dtype", "int32") != "int32":
        return refused(label, f"packed into {settings['pack_dtype']} is not understood; int32 is")
    if settings.get("dynamic"):
        label += ", with rules of its own for some modules"
    return Quantisation(label, partial(_plain, bits=bits, offset=_OFFSETS[form], group=group))


def _plain(tensors: Mapping[str, TensorSlot], *, bits: int, offset: int, group: int) -> list[PlainTensor]:
    computed = []
    for base, parts in grouped(tensors, _WEIGHT, (_ZEROS, _SCALES), (_GROUPS,)).items():
        width = _width(parts) or bits
        compute = partial(_dequantise, bits=width, offset=offset, group=group)
        *stack, words, outputs = parts[_WEIGHT].shape
        shape = (*stack, outputs, packed_count(words, width))
        computed.append(PlainTensor(f"{base}.weight", parts, shape, compute))
    return with_the_rest(tensors, computed)


def _width(parts: Mapping[str, TensorSlot]) -> int | None:
    """The width of a module's numbers as its shapes tell it: rules for single modules may give it its own."""
    if _GROUPS not in parts or len(parts[_GROUPS].shape) != 1 or not parts[_GROUPS].shape[0]:
        return None
    width = 32 * parts[_WEIGHT].shape[0] / parts[_GROUPS].shape[0]
    return int(width) if width in _WIDTHS else None


def _dequantise(values: Values, *, bits: int, offset: int, group: int) -> torch.Tensor:
    import torch

    weight = unpacked(values[_WEIGHT].transpose(-1, -2), bits)
    zeros = unpacked(values[_ZEROS], bits) + offset
    scales = values[_SCALES].float()
    inputs, outputs = weight.shape[-1], scales.shape[-1]
    if weight.shape[-2] != outputs or zeros.shape[-1] < outputs:
        raise ValueError("scales, zero points and weights have other numbers of outputs")
    consecutive = torch.arange(inputs) // (group if group > 0 else inputs)
    index = values[_GROUPS].long() if _GROUPS in values else consecutive
    if index.ndim != 1 or len(index) != inputs:
        raise ValueError("g_idx does not give a group for every input")
    zeros, scales = zeros[..., :outputs].transpose(-1, -2), scales.transpose(-1, -2)
    groups = scales.shape[-1]
    if inputs % groups == 0 and torch.equal(index, torch.arange(inputs) // (inputs // groups)):  # no gathering
        stacked = weight.reshape(*weight.shape[:-1], groups, -1)
        return ((stacked - zeros[..., None]) * scales[..., None]).flatten(-2)
    return (weight - zeros[..., index]) * scales[..., index]
