"""MLX checkpoints: numbers of 2 to 8 bits with a scale and an offset per group of inputs, or MXFP4.

On disk: ``X.weight`` ``[out, in * b / 32]`` (a stream of bits along the inputs), ``X.scales`` and, in the mode
``affine``, ``X.biases`` ``[out, in / g]``: ``w = q * scale + bias``; in the mode ``mxfp4`` scales are biased exponents
(bytes). Routers may be quantised as well. ``config.json`` has the settings as ``quantization``, with those of single
modules under their names.

MLX lays models out in its own way. Experts are stacked in ``switch_mlp.{gate,up,down}_proj`` ``[E, ...]`` (gpt-oss:
``experts.{gate,up,down}_proj``), and the up-projection of latent attention is split into ``embed_q`` and
``unembed_out``, one matrix per head. The plain tensors have the names and layouts that Transformers reads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.families import FAMILIES, Family
from shape_moe.architectures.quantised.bits import unpacked
from shape_moe.architectures.quantised.fp4 import fp4_values, powers_of_two
from shape_moe.architectures.quantised.method import Config, Quantisation, refused, register, settings_of
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, joined, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

_KEY = "quantization"
_WEIGHT, _SCALES, _BIASES = ".weight", ".scales", ".biases"
_AFFINE, _MXFP4 = "affine", "mxfp4"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_STACK = re.compile(r"(.+)\.(switch_mlp|experts)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
_LATENT = re.compile(r"(.+)\.(embed_q|unembed_out)\.weight")


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
    used = [settings, *(own for own in settings.values() if isinstance(own, Mapping))]
    modes = list(dict.fromkeys(str(own.get("mode", _AFFINE)) for own in used))
    label += f" ({', '.join(modes)})" if modes != [_AFFINE] else ""
    if others := [mode for mode in modes if mode not in (_AFFINE, _MXFP4)]:
        return refused(label, f"is not understood in the mode {others[0]}; {_AFFINE} and {_MXFP4} are")
    family = FAMILIES.get(config.get("model_type") or "")
    return Quantisation(label, partial(_plain, settings=settings, family=family))


def _plain(tensors: Mapping[str, TensorSlot], settings: Mapping[str, Any], family: Family | None) -> list[PlainTensor]:
    computed = []
    for base, parts in grouped(tensors, _SCALES, (_WEIGHT,), (_BIASES,)).items():
        own = settings.get(base)
        size = int((own if isinstance(own, Mapping) else settings).get("group_size") or settings["group_size"])
        *rows, groups = parts[_SCALES].shape
        computed.append(PlainTensor(base + _WEIGHT, parts, (*rows, groups * size), partial(_dequantise, group=size)))
    return list(_as_transformers_has_them(with_the_rest(tensors, computed), family))


def _as_transformers_has_them(tensors: Iterable[PlainTensor], family: Family | None) -> Iterator[PlainTensor]:
    """The tensors under the names and in the layouts that Transformers reads."""
    stacks: dict[tuple[str, str], dict[str, PlainTensor]] = defaultdict(dict)
    latent: dict[str, dict[str, PlainTensor]] = defaultdict(dict)
    for tensor in tensors:
        if found := _STACK.fullmatch(tensor.name):
            stacks[found[1], found[4]][found[3]] = tensor
        elif found := _LATENT.fullmatch(tensor.name):
            latent[found[1]][found[2]] = tensor
        else:
            yield tensor
    for (block, kind), stack in stacks.items():
        yield from _experts(block, kind, stack, family)
    for place, pair in latent.items():
        yield _joined_latent(place, pair)


def _experts(block: str, kind: str, stack: Mapping[str, PlainTensor], family: Family | None) -> Iterator[PlainTensor]:
    """The stacks of a layer's experts as Transformers has them on disk."""
    if missing := set(_PROJECTIONS) - set(stack):
        raise CheckpointError(f"{block}: the experts' {min(missing)} is missing: download or copy the model again.")
    gate, up, down = (stack[projection] for projection in _PROJECTIONS)
    if family is not None and family.projections and kind == "weight":
        for projection, tensor in zip(family.projections, (gate, up, down), strict=True):
            for expert in range(tensor.shape[0]):
                yield replace(tensor.row(expert), name=f"{block}.experts.{expert}.{projection}.weight")
    elif family is not None and family.packed:
        experts, rows, columns = gate.shape
        yield joined(f"{block}.{family.packed[0]}", (experts, 2 * rows, columns), {"gate": gate, "up": up}, _one_by_one)
        yield replace(down, name=f"{block}.{family.packed[1]}")
    elif family is not None and ".experts." in gate.name:
        *sides, rows = gate.shape if kind == "bias" else (gate.shape[0], gate.shape[2], gate.shape[1])
        ending = "_bias" if kind == "bias" else ""
        combine = partial(_interleaved, transposed=kind != "bias")
        yield joined(f"{block}.experts.gate_up_proj{ending}", (*sides, 2 * rows), {"gate": gate, "up": up}, combine)
        turned = (*down.shape[:-2], down.shape[-1], down.shape[-2]) if kind != "bias" else down.shape
        yield joined(
            f"{block}.experts.down_proj{ending}", turned, {"down": down}, partial(_only, transposed=kind != "bias")
        )
    else:
        raise UnsupportedModelError(f"{gate.name}: how MLX stacks the experts of this family is not understood.")


def _one_by_one(values: Values) -> torch.Tensor:
    import torch

    return torch.cat((values["gate"], values["up"]), dim=-2)


def _interleaved(values: Values, *, transposed: bool) -> torch.Tensor:
    import torch

    rows = -2 if transposed else -1
    both = torch.stack((values["gate"], values["up"]), dim=rows).flatten(rows - 1, rows)
    return both.transpose(-1, -2) if transposed else both


def _only(values: Values, *, transposed: bool) -> torch.Tensor:
    return values["down"].transpose(-1, -2) if transposed else values["down"]


def _joined_latent(place: str, pair: Mapping[str, PlainTensor]) -> PlainTensor:
    """The up-projection of latent attention from its two halves."""
    if len(pair) != 2:
        raise CheckpointError(f"{place}: a half of kv_b_proj is missing: download or copy the model again.")
    heads, rank, keys = pair["embed_q"].shape
    shape = (heads * (keys + pair["unembed_out"].shape[1]), rank)
    return joined(f"{place}.kv_b_proj.weight", shape, pair, _latent)


def _latent(values: Values) -> torch.Tensor:
    import torch

    return torch.cat((values["embed_q"].transpose(-1, -2), values["unembed_out"]), dim=-2).flatten(0, 1)


def _dequantise(values: Values, group: int) -> torch.Tensor:
    words, scales = values[_WEIGHT], values[_SCALES]
    inputs = scales.shape[-1] * group
    bits, rest = divmod(32 * words.shape[-1], inputs)
    if rest or not 1 <= bits <= 8:
        raise ValueError(f"{words.shape[-1]} words do not hold {inputs} numbers")
    numbers = unpacked(words, bits).reshape(*scales.shape, group)
    if _BIASES not in values:
        return (fp4_values(numbers) * powers_of_two(scales)[..., None]).flatten(-2)
    return (numbers * scales.float()[..., None] + values[_BIASES].float()[..., None]).flatten(-2)
