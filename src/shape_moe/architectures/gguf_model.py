"""A model in a GGUF file, seen as a model folder is: a configuration, and tensors under Transformers' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.gguf_architectures import (
    ARCHITECTURES,
    LEFT_ASIDE,
    UNNAMED_SUFFIX,
    GgufArchitecture,
)
from shape_moe.architectures.gguf_config import gguf_config
from shape_moe.architectures.gguf_file import GgufHeader, GgufTensor, read_parts, type_numbers
from shape_moe.architectures.quantised.method import Quantisation
from shape_moe.architectures.quantised.plain import PlainTensor
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.architectures.weight_source import Form
from shape_moe.errors import CheckpointError, UnsupportedModelError, first_line

if TYPE_CHECKING:
    import numpy as np
    import torch

_EXPERTS = "mlp.experts."
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class GgufModel(Snapshot):
    """A model in one GGUF file, or in the parts that one was split into.

    Tensors have Transformers' names; those that hold all experts of a layer are called
    ``model.layers.N.mlp.experts.{gate,up,down}_proj.weight`` in every family. Their dtype is GGUF's name of the type.

    Attributes:
        headers: of the files, in order.
        stored_names: the name in the file of every tensor, by its name here.
    """

    headers: tuple[GgufHeader, ...] = ()
    stored_names: dict[str, str] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the first file, by key."""
        return self.headers[0].metadata

    @cached_property
    def names(self) -> dict[str, str]:
        """The name here of every tensor, by its name in the file."""
        return {stored: name for name, stored in self.stored_names.items()}

    @cached_property
    def architecture(self) -> GgufArchitecture:
        """Facts about the architecture."""
        return ARCHITECTURES[str(self.metadata["general.architecture"])]

    @property
    def forms(self) -> frozenset[Form]:
        """The forms in which values are given: all, where the ``gguf`` package can dequantise every type."""
        return frozenset(("raw",) if self.why_not_dequantised is not None else ("raw", "dequantised"))

    @cached_property
    def unreadable(self) -> tuple[str, ...]:
        """Types of tensors that the ``gguf`` package cannot dequantise."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import _type_traits

        able = {"F32", "F16", *(kind.name for kind in _type_traits if isinstance(kind, GGMLQuantizationType))}
        return tuple(sorted({slot.dtype for slot in self.tensors.values()} - able))

    @property
    def why_not_dequantised(self) -> str | None:
        """What of the tensors cannot be dequantised, None where everything can."""
        return f"the gguf package cannot dequantise {', '.join(self.unreadable)}" if self.unreadable else None

    def values(self, slot: TensorSlot, form: Form = "raw") -> torch.Tensor:
        """The values of a tensor, or of a row of it.

        Args:
            slot: the tensor, or its row.
            form: ``raw``: the bytes (uint8) as they are stored; ``dequantised``: float32, rows in Transformers' order.

        Raises:
            UnsupportedModelError: for a type that the ``gguf`` package cannot dequantise.
            CheckpointError: when the file has become shorter.
        """
        import torch

        content = slot.read()
        if len(content) != slot.size:
            raise CheckpointError(f"{slot.file} became shorter while it was read.")
        if form == "raw":
            return torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if slot.dtype in self.unreadable:
            raise UnsupportedModelError(f"{self.name}: {self.why_not_dequantised}.")
        return torch.from_numpy(self._in_order(slot.name, _dequantised(content, slot)))

    def _in_order(self, name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Undo what conversion did to the order of a tensor's rows."""
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config.get("num_key_value_heads") or self.config["num_attention_heads"],
        }
        module = name.rpartition(".")[0].rpartition(".")[2]
        if not self.architecture.swapped_rotary or module not in heads:
            return values
        count, rest = heads[module], values.shape[1:]
        pairs = values.reshape(count, values.shape[0] // count // 2, 2, *rest)
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def live_names(self, layer: int | None = None) -> dict[str, tuple[str, ...]]:
        """The tensors of the live model in Transformers, each with the tensors here that it is made of.

        Args:
            layer: a decoder layer, -1 for what lies outside of them, None for all.

        """
        made: dict[str, tuple[str, ...]] = {}
        for name in self.tensors:
            role = self.role(name)
            if name.endswith(LEFT_ASIDE) or role.layer >= self.moe.num_layers or layer not in (None, role.layer):
                continue
            live = self._live_name(name)
            if live is not None:
                made[live] = (*made.get(live, ()), name)
        return made

    def _live_name(self, name: str) -> str | None:
        """The name of the tensor of the live model to which one contributes, None for none by itself."""
        before, experts, part = name.partition(_EXPERTS)
        if experts:
            projection, _, suffix = part.partition(".")
            if suffix in ("scale", "input_scale"):
                return None  # the former is looked up with the weight, the latter serves kernels
            joined = "gate_up_proj" if projection in ("gate_proj", "up_proj") else projection
            return f"{before}{experts}{joined}{'_bias' if suffix == 'bias' else ''}"
        if name.endswith((".k_b_proj.weight", ".v_b_proj.weight")):
            return name.replace(".k_b_proj.", ".kv_b_proj.").replace(".v_b_proj.", ".kv_b_proj.")
        return name

    @cached_property
    def plain_or_stored(self) -> list[PlainTensor]:
        """The tensors of the live model."""
        return [self._plain_tensor(live, names) for live, names in self.live_names().items()]

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """How the weights are quantised, None where they are floats."""
        kinds = sorted({slot.dtype for slot in self.tensors.values()} - _FLOATS)
        if not kinds:
            return None
        refusal = f"cannot be loaded: {self.why_not_dequantised}" if self.why_not_dequantised else None
        return Quantisation(f"GGUF {', '.join(kinds)}", lambda _: self.plain_or_stored, refusal)

    def _plain_tensor(self, live: str, names: tuple[str, ...]) -> PlainTensor:
        parts = {name: self.tensors[name] for name in names}
        for name in names:
            if name.endswith(".weight") and (scale := _scale_of(name)) in self.tensors:
                parts[scale] = self.tensors[scale]
        shape = self._live_shape(live, [self.tensors[name].shape for name in names])
        return PlainTensor(live, parts, shape, partial(self._live, live), partial(self.values, form="dequantised"))

    def _live_shape(self, live: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of a tensor of the live model from those of its parts."""
        shape = shapes[0]
        if live.endswith(".kv_b_proj.weight"):
            rank = int(self.config["kv_lora_rank"])
            return (sum(math.prod(part) for part in shapes) // rank, rank)
        if live.endswith("shared_expert_gate.weight"):
            return (1, shape[-1])
        if _EXPERTS not in live:
            return shape
        if live.endswith("_bias"):
            return (shape[0], sum(part[1] for part in shapes))
        experts, rows, columns = shape[0], sum(part[1] for part in shapes), shape[2]
        return (experts, columns, rows) if self.architecture.interleaved_experts else (experts, rows, columns)

    def _live(self, live: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A tensor of the live model, or its row of one expert, from the values of its parts."""
        found = {}
        for name, part in values.items():
            if not name.endswith(".scale"):
                scale = values.get(_scale_of(name)) if name.endswith(".weight") else None
                found[name.rsplit(".", 2)[-2]] = part if scale is None else part * _times_rows(scale, part)
        if _EXPERTS in live:
            return self._experts(live, found)
        if live.endswith(".kv_b_proj.weight") and "kv_b_proj" not in found:
            return self._joined_latent(live, found)
        joined = next(iter(found.values()))
        return joined.reshape(1, -1) if live.endswith("shared_expert_gate.weight") else joined

    def _experts(self, live: str, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A tensor of all experts of a layer: gate and up joined, each expert transposed where the family wants it."""
        import torch

        transposed, values = self.architecture.interleaved_experts, next(iter(found.values()))
        bias = live.endswith("_bias")
        if "gate_up_proj" in live and "gate_up_proj" not in found:
            if found.keys() != {"gate_proj", "up_proj"}:
                raise CheckpointError(f"{self.name}: {live} lacks its gate or up part: the file is not a whole model.")
            pair, rows = [found["gate_proj"], found["up_proj"]], -1 if bias else -2
            interleaved = torch.stack(pair, dim=rows).flatten(rows - 1, rows)
            values = interleaved if transposed else torch.cat(pair, dim=rows)
        return values.transpose(-1, -2).contiguous() if transposed and not bias else values

    def _joined_latent(self, live: str, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The up-projection of latent attention, which conversion takes apart: keys transposed, per head."""
        import torch

        if found.keys() != {"k_b_proj", "v_b_proj"}:
            raise CheckpointError(f"{self.name}: {live} lacks a part: the file is not a whole model.")
        heads, rank = self.config["num_attention_heads"], self.config["kv_lora_rank"]
        keys = found["k_b_proj"].reshape(heads, rank, -1).transpose(1, 2)
        values = found["v_b_proj"].reshape(heads, -1, rank)
        return torch.cat([keys, values], dim=1).reshape(-1, rank).contiguous()


def _scale_of(name: str) -> str:
    """The name of the experts' own scales, which belong to a weight."""
    return f"{name.rpartition('.')[0]}.scale"


def _times_rows(scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One scale per expert, in a shape that multiplies the experts' values."""
    return scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))


def _dequantised(content: bytes, slot: TensorSlot) -> np.ndarray[Any, Any]:
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = math.prod(slot.shape[:-1])
    stored = np.frombuffer(content, dtype=np.uint8).reshape(rows, -1)
    kind = GGMLQuantizationType(type_numbers()[slot.dtype])
    plain = {"F32": np.float32, "F16": np.float16}.get(slot.dtype)
    try:
        values = stored.view(plain) if plain is not None else dequantize(stored, kind)
    except (NotImplementedError, ValueError, IndexError) as error:
        raise UnsupportedModelError(f"{slot.file}: {slot.name} cannot be dequantised: {first_line(error)}") from error
    return np.array(values, dtype=np.float32).reshape(slot.shape)


def open_gguf(file: Path, name: str) -> GgufModel:
    """Open a model in a GGUF file, or in the parts that one was split into.

    Args:
        file: the file, or any part.
        name: what the user calls it.

    Raises:
        CheckpointError: when a file is missing or damaged.
        UnsupportedModelError: for an architecture that is not known.
    """
    headers = read_parts(file)
    stored = {tensor.name: tensor for header in headers for tensor in header.tensors.values()}
    config = gguf_config(headers[0].metadata, stored, file)
    names = tensor_names(ARCHITECTURES[headers[0].metadata["general.architecture"]], config, stored)
    tensors = {names[tensor.name]: _slot(names[tensor.name], tensor) for tensor in stored.values()}
    stored_names = {new: old for old, new in names.items()}
    return GgufModel(headers[0].file, config, tensors, name, headers=tuple(headers), stored_names=stored_names)


def _slot(name: str, tensor: GgufTensor) -> TensorSlot:
    return TensorSlot(name, tensor.type_name, tensor.shape, tensor.file, tensor.start, tensor.size)


def tensor_names(
    known: GgufArchitecture, config: Mapping[str, Any], stored: Mapping[str, GgufTensor]
) -> dict[str, str]:
    """Transformers' names by the names in the file; the map between them is the ``gguf`` package's.

    Raises:
        UnsupportedModelError: for a tensor that the architecture is not known to have.
    """
    from gguf.constants import MODEL_ARCH
    from gguf.tensor_mapping import get_tensor_name_map

    layers = config["num_hidden_layers"] + (config.get("num_nextn_predict_layers") or 0)
    mapping = get_tensor_name_map(getattr(MODEL_ARCH, known.map_name), layers)
    modules = [*known.model_modules]
    modules += [f"model.layers.{layer}.{module}" for layer in range(layers) for module in known.layer_modules]
    by_stored = {found: module for module in modules if (found := mapping.get_name(module)) is not None}
    for layer in range(layers):  # some converters fuse them, and the map does not have that for every architecture
        by_stored.setdefault(f"blk.{layer}.ffn_gate_up_exps", f"model.layers.{layer}.{_EXPERTS}gate_up_proj")
    names = {}
    for name in stored:
        base, _, suffix = name.rpartition(".")
        if base in by_stored:
            names[name] = _with_suffix(by_stored[base], suffix)
        elif name.endswith(LEFT_ASIDE):
            names[name] = name
        elif (layer := _layer_of(name)) >= config["num_hidden_layers"]:
            names[name] = f"model.layers.{layer}.{name}"
        else:
            raise UnsupportedModelError(
                f"Tensor {name} is not known for GGUF files of the architecture {known.name!r}."
            )
    return names


def _layer_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and len(parts) > 2 and parts[1].isdecimal() else -1


def _with_suffix(module: str, suffix: str) -> str:
    short = module.partition(".layers.")[2].partition(".")[2]
    return module + UNNAMED_SUFFIX[short] if short in UNNAMED_SUFFIX else f"{module}.{suffix}"
