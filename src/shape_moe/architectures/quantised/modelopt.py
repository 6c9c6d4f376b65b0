"""Checkpoints of NVIDIA's modelopt: FP8 with a scale per tensor, and NVFP4.

NVFP4 on disk: ``X.weight`` ``[out, in / 2]`` (bytes, two values each), ``X.weight_scale`` ``[out, in / 16]`` (float8)
and ``X.weight_scale_2`` (one number): ``w = q * weight_scale * weight_scale_2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from shape_moe.architectures.quantised.fp4 import unpacked_fp4
from shape_moe.architectures.quantised.fp8 import ACTIVATION_SCALES, plain_fp8
from shape_moe.architectures.quantised.method import Config, Plain, Quantisation, refused, register, settings_of
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, with_the_rest
from shape_moe.architectures.safetensors_file import TensorSlot

if TYPE_CHECKING:
    import torch

_WEIGHT, _SCALES, _SCALE = ".weight", ".weight_scale", ".weight_scale_2"


@register("modelopt", file="hf_quant_config.json")
def open_modelopt(config: Config) -> Quantisation:
    """A modelopt checkpoint as its settings describe it."""
    settings = settings_of(config)
    quantization = settings.get("quantization")
    inner = quantization if isinstance(quantization, Mapping) else settings
    algorithm = str(inner.get("quant_algo"))
    label = f"modelopt {algorithm}"
    known: dict[str, Plain] = {"FP8": partial(plain_fp8, block=None), "NVFP4": _plain_nvfp4}
    if algorithm not in known:
        return refused(label, f"is not understood; {' and '.join(known)} are")
    return Quantisation(label, known[algorithm])


@register("modelopt_fp4")
def open_modelopt_fp4(config: Config) -> Quantisation:
    """NVFP4 under the name that some versions write."""
    del config
    return Quantisation("modelopt NVFP4", _plain_nvfp4)


def _plain_nvfp4(tensors: Mapping[str, TensorSlot]) -> list[PlainTensor]:
    groups = grouped(tensors, _SCALE, (_SCALES, _WEIGHT))
    computed = []
    for base, parts in groups.items():
        *outputs, size = parts[_WEIGHT].shape
        computed.append(PlainTensor(f"{base}.weight", parts, (*outputs, 2 * size), _dequantise))
    return with_the_rest(tensors, computed, ACTIVATION_SCALES)


def _dequantise(values: Values) -> torch.Tensor:
    weight, scales = unpacked_fp4(values[_WEIGHT]), values[_SCALES].float() * values[_SCALE].float()
    return (weight.reshape(*scales.shape, -1) * scales[..., None]).flatten(-2)
