"""MLX checkpoints: whole numbers of 2 to 8 bits with a scale and an offset per group of inputs.

On disk: ``X.weight`` ``[out, in * b / 32]`` (a stream of bits along the inputs), ``X.scales`` and ``X.biases``
``[out, in / g]``: ``w = q * scale + bias``. All experts of a layer are stacked in ``switch_mlp.gate_proj``, ``up_proj``
and ``down_proj`` (``[E, ...]``), and routers may be quantised as well. ``config.json`` has the settings as
``quantization``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.quantised.bits import unpacked
from shape_moe.architectures.quantised.method import Config, Quantisation, refused, register, settings_of
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

_KEY = "quantization"
_WEIGHT, _SCALES, _BIASES = ".weight", ".scales", ".biases"
_STACK = re.compile(r"(.+)\.switch_mlp\.(gate_proj|up_proj|down_proj)\.weight")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _settings(config: Config) -> Mapping[str, Any]:
    return config.get(_KEY) or settings_of(config)


def _recognises(config: Config) -> bool:
    settings = _settings(config)
    return isinstance(settings, Mapping) and "quant_method" not in settings and {"bits", "group_size"} <= set(settings)


@register("mlx", recognises=_recognises)
def open_mlx(config: Config) -> Quantisation:
    """An MLX checkpoint as its settings describe it."""
    settings = _settings(config)
    label = f"MLX {settings['bits']}-bit, groups of {settings['group_size']}"
    if (mode := settings.get("mode", "affine")) != "affine":
        return refused(f"{label} ({mode})", "is not understood; the mode affine is")
    family = FAMILIES.get(config.get("model_type") or "")
    projections = family.projections if family else None
    return Quantisation(label, partial(_plain, settings=settings, projections=projections))


def _plain(
    tensors: Mapping[str, TensorSlot], settings: Mapping[str, Any], projections: tuple[str, ...] | None
) -> list[PlainTensor]:
    computed = []
    for base, parts in grouped(tensors, _SCALES, (_WEIGHT, _BIASES)).items():
        own = settings.get(base)
        group = own.get("group_size") if isinstance(own, Mapping) else None
        size = int(group or settings["group_size"])
        *rows, groups = parts[_SCALES].shape
        computed.append(PlainTensor(base + _WEIGHT, parts, (*rows, groups * size), partial(_dequantise, group=size)))
    return [each for tensor in with_the_rest(tensors, computed) for each in _by_expert(tensor, projections)]


def _by_expert(tensor: PlainTensor, projections: tuple[str, ...] | None) -> Iterator[PlainTensor]:
    """A stack of experts as one tensor for each, under the names that Transformers reads; others as they are."""
    found = _STACK.fullmatch(tensor.name)
    if found is None:
        yield tensor
        return
    if projections is None:
        raise UnsupportedModelError(f"{tensor.name}: how MLX stacks the experts of this family is not understood.")
    projection = projections[_PROJECTIONS.index(found[2])]
    for expert in range(next(iter(tensor.parts.values())).shape[0]):
        yield replace(tensor.row(expert), name=f"{found[1]}.experts.{expert}.{projection}.weight")


def _dequantise(values: Values, group: int) -> torch.Tensor:
    scales, biases = values[_SCALES].float(), values[_BIASES].float()
    words, inputs = values[_WEIGHT], scales.shape[-1] * group
    bits, rest = divmod(32 * words.shape[-1], inputs)
    if rest or not 1 <= bits <= 8:
        raise ValueError(f"{words.shape[-1]} words do not hold {inputs} numbers")
    numbers = unpacked(words, bits).reshape(*scales.shape, group)
    return (numbers * scales[..., None] + biases[..., None]).flatten(-2)
