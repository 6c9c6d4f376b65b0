"""bitsandbytes in four bits (NF4, FP4): codes of a table of sixteen values, with a scale per block of the flat matrix.

On disk: ``X.weight`` (bytes, flat, the upper half first), ``X.weight.absmax`` (scales), ``X.weight.quant_map`` (the
table) and ``X.weight.quant_state.bitsandbytes__nf4`` (a JSON text with block size and shape). Where the scales are
quantised too they are codes of ``X.weight.nested_quant_map`` with scales ``X.weight.nested_absmax``, and an offset is
added. (The library's own function for processors, in 0.50, takes the wrong scales where rows are not whole blocks.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.quantised.method import Config, Quantisation, refused, register, settings_of
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch

_KINDS = ("nf4", "fp4")
_STATE, _WEIGHT, _SCALES, _TABLE = ".quant_state.bitsandbytes__", "", ".absmax", ".quant_map"
_NESTED_SCALES, _NESTED_TABLE = ".nested_absmax", ".nested_quant_map"


@register("bitsandbytes")
def open_bitsandbytes(config: Config) -> Quantisation:
    """A checkpoint of bitsandbytes as its settings describe it."""
    settings = settings_of(config)
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return refused("bitsandbytes 8-bit", "is not dequantised here; 4-bit is")
    kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
    return Quantisation(f"bitsandbytes 4-bit ({kind.upper()})", _plain)


def _plain(tensors: Mapping[str, TensorSlot]) -> list[PlainTensor]:
    computed = []
    for kind in _KINDS:
        state = _STATE + kind
        groups = grouped(tensors, state, (_WEIGHT, _SCALES, _TABLE), (_NESTED_SCALES, _NESTED_TABLE))
        for base, parts in groups.items():
            shape = _described_shape(parts[state]) or (2 * parts[_WEIGHT].size,)
            computed.append(PlainTensor(base, parts, shape, partial(_dequantise, state=state)))
    return with_the_rest(tensors, computed)


def _described_shape(state: TensorSlot) -> tuple[int, ...] | None:
    """The shape that the text beside a tensor says, None where there is no file to read it from."""
    if not state.file.is_file():
        return None
    try:
        return tuple(int(side) for side in json.loads(state.read())["shape"])
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{state.name} is not a description of a quantised tensor: {first_line(error)}"
        ) from error


def _dequantise(values: Values, state: str) -> torch.Tensor:
    import torch

    described: dict[str, Any] = json.loads(bytes(values[state].tolist()))
    scales = values[_SCALES]
    if _NESTED_SCALES in values:
        outer = _by_block(values[_NESTED_SCALES].float(), int(described["nested_blocksize"]), len(scales))
        scales = values[_NESTED_TABLE].float()[scales.to(torch.int32)] * outer + float(described["nested_offset"])
    stored = values[_WEIGHT].flatten()
    codes = torch.stack((stored >> 4, stored & 15), dim=-1).flatten().to(torch.int32)
    weight = values[_TABLE].float()[codes] * _by_block(scales.float(), int(described["blocksize"]), len(codes))
    return weight.reshape(described["shape"])


def _by_block(scales: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """The scale of each of ``count`` numbers in blocks of a size, the last of which may be smaller."""
    if len(scales) != -(-count // size):
        raise ValueError(f"{len(scales)} scales do not fit {count} numbers in blocks of {size}")
    return scales.repeat_interleave(size)[:count]
