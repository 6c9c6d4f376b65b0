"""Checkpoints of compressed-tensors (llm-compressor), dequantised by that library.

On disk: ``X.weight`` (int8, float8) or ``X.weight_packed`` (int4 and the like in 32-bit words, NVFP4 in bytes),
``X.weight_scale`` and, by format, ``X.weight_zero_point``, ``X.weight_global_scale``, ``X.weight_shape``,
``X.weight_g_idx``. Settings come in groups, each with the modules that it is meant for (``targets``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.quantised.method import Config, Quantisation, refused, register, settings_of
from shape_moe.architectures.quantised.plain import PlainTensor, Values, grouped, with_the_rest
from shape_moe.architectures.safetensors_file import DTYPE_BITS, TensorSlot
from shape_moe.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

_LIBRARY = "compressed_tensors"
_SCALE, _PACKED, _WHOLE = ".weight_scale", ".weight_packed", ".weight"
_ZEROS, _GLOBAL, _SHAPE, _ORDER = ".weight_zero_point", ".weight_global_scale", ".weight_shape", ".weight_g_idx"
_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
_ASIDE = (".input_scale", ".output_scale", ".input_global_scale", ".input_zero_point")
_FLOATS = ("weight_scale", "weight_global_scale")


@register("compressed-tensors")
def open_compressed(config: Config) -> Quantisation:
    """A checkpoint of compressed-tensors as its settings describe it."""
    settings = settings_of(config)
    groups = settings.get("config_groups")
    if (
        not isinstance(groups, Mapping)
        or not groups
        or not all(isinstance(group, Mapping) for group in groups.values())
    ):
        return refused("compressed-tensors", "without a table config_groups is not understood")
    schemes = [_Scheme(group, settings.get("format")) for group in groups.values()]
    label = "compressed-tensors " + ", ".join(dict.fromkeys(scheme.label for scheme in schemes))
    why = None
    unknown = [scheme.form for scheme in schemes if scheme.form not in _FORMATS]
    if unknown:
        return refused(label, f"in the format {unknown[0]!r} is not understood; {', '.join(_FORMATS)} are")
    if find_spec(_LIBRARY) is None:
        why = "is dequantised by its own library, which is not installed: pip install compressed-tensors"
    elif settings.get("sparsity_config") and settings["sparsity_config"].get("format", "dense") != "dense":
        why = "with sparse weights is not understood"
    return Quantisation(label, partial(_plain, schemes=schemes), why)


class _Scheme:
    """One group of settings.

    Args:
        group: the settings.
        form: the format of the whole checkpoint, for a group that names none.
    """

    def __init__(self, group: Mapping[str, Any], form: str | None) -> None:
        self.group = group
        self.form = group.get("format") or form
        weights = group.get("weights")
        self.weights: Mapping[str, Any] = weights if isinstance(weights, Mapping) else {}
        self.bits = int(self.weights.get("num_bits") or 8)
        self.targets = [str(target) for target in group.get("targets") or ()]

    @property
    def label(self) -> str:
        """The kind of numbers and the format."""
        return f"{self.weights.get('type', 'int')}{self.bits} ({self.form})"

    def closeness(self, module: str) -> int:
        """How closely the group is meant for a module: by its name, by a pattern, by its class, not at all."""
        if module in self.targets:
            return 3
        if any(target.startswith("re:") and re.match(target[3:], module) for target in self.targets):
            return 2
        return int("Linear" in self.targets)


def _plain(tensors: Mapping[str, TensorSlot], schemes: Sequence[_Scheme]) -> list[PlainTensor]:
    computed = []
    for base, parts in grouped(tensors, _SCALE, (), (_PACKED, _WHOLE, _ZEROS, _GLOBAL, _SHAPE, _ORDER)).items():
        weight = parts.get(_PACKED) or parts.get(_WHOLE)
        if weight is None:
            raise CheckpointError(f"{base}.weight_scale is there, but no weight beside it.")
        if len(weight.shape) != 2:
            raise UnsupportedModelError(
                f"{weight.name} holds more than one matrix, which compressed-tensors does not dequantise."
            )
        if _ORDER in parts and _ZEROS in parts:
            raise UnsupportedModelError(
                f"{weight.name} is quantised with both zero points and an order of activation (weight_g_idx): that "
                "is not understood."
            )
        scheme = max(schemes, key=lambda group: group.closeness(base))
        outputs, words = weight.shape
        shape = (outputs, words * DTYPE_BITS[weight.dtype] // scheme.bits)
        computed.append(PlainTensor(f"{base}.weight", parts, shape, partial(_dequantise, scheme=scheme)))
    return with_the_rest(tensors, computed, _ASIDE)


def _dequantise(values: Values, scheme: _Scheme) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    given = {name.removeprefix("."): tensor for name, tensor in values.items()}
    if scheme.weights.get("type") == "int" or given["weight_scale"].dtype.itemsize > 1:
        given |= {name: given[name].float() for name in _FLOATS if name in given}
    settings = {key: value for key, value in scheme.group.items() if key != "targets"}
    order = given.pop("weight_g_idx", None)
    if order is not None:  # a group of one input each, in the order of the inputs
        given["weight_scale"] = given["weight_scale"][:, order.long()]
        settings["weights"] = {**scheme.weights, "group_size": 1, "strategy": "group", "actorder": None}
    library = QuantizationScheme.model_validate({**settings, "targets": ["Linear"], "format": scheme.form})
    decompressor = BaseCompressor.get_value_from_registry(scheme.form)
    result: torch.Tensor = decompressor.decompress(given, library)["weight"]
    return result.float()
