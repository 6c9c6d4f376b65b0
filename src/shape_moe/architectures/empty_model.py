"""A Transformers model without weights, and the conversion that puts tensors of its checkpoint into it.

Transformers' own loading decides on class, dtype, buffers and conversions of names and layouts, once for the empty
model and then for each part of the checkpoint that is put into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.loading import LOADING_ERRORS, quietly
from shape_moe.architectures.plain_model import is_stored_plain, plain_config, plain_dtype
from shape_moe.architectures.quantised.plain import PlainTensor
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class ShapeAlone:
    """Stands for a tensor on disk while a model is built without weights: Transformers reads a slice of it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    @classmethod
    def of(cls, tensor: PlainTensor) -> ShapeAlone:
        """What stands for a tensor on disk."""
        import torch

        return cls(tensor.shape, torch.float32)

    def __getitem__(self, _everything: Any) -> ShapeAlone:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:  # noqa: ARG002  # its interface
        """A tensor of this shape without values, whatever device is asked for."""
        import torch

        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


class Once:
    """Gives a tensor once and lets go of it, so that it is free as soon as its conversion is done."""

    def __init__(self, tensors: dict[str, torch.Tensor], name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, _everything: Any) -> torch.Tensor:
        return self._tensors.pop(self._name)


def without_weights(snapshot: Snapshot, dtype: str) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model with all weights of the checkpoint on the meta device and its buffers real, and its loading info."""
    import torch
    import transformers
    from transformers import GenerationConfig

    shapes = {name: ShapeAlone.of(tensor) for name, tensor in snapshot.plain.items()}
    try:
        with quietly():
            config = plain_config(snapshot)
            chosen = _stored_dtype(snapshot, config) if dtype == "auto" else getattr(torch, dtype)
            found: tuple[PreTrainedModel, dict[str, Any]] = getattr(
                transformers, snapshot.moe.family.stock_class
            ).from_pretrained(
                None,
                config=config,
                state_dict=shapes,
                dtype=chosen,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            if (snapshot.path / "generation_config.json").is_file():
                found[0].generation_config = GenerationConfig.from_pretrained(snapshot.path)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"Transformers could not build {snapshot.name}: {first_line(error)}") from error
    return found


def _stored_dtype(snapshot: Snapshot, config: Any) -> torch.dtype:
    """The checkpoint's dtype as Transformers finds it: what the configuration says, or the first tensor's."""
    import torch

    if not is_stored_plain(snapshot):
        named: torch.dtype = getattr(torch, plain_dtype(snapshot))
        return named
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return next((names[slot.dtype] for slot in snapshot.tensors.values() if slot.dtype in names), torch.float32)


def load_config(model: PreTrainedModel, device: torch.device) -> Any:
    """How Transformers converts and places the tensors of this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    return LoadStateDictConfig(
        device_map={"": device},
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),  # noqa: SLF001  # as from_pretrained does
        weight_mapping=get_model_conversion_mapping(model, None, None),
        ignore_mismatched_sizes=True,
    )


def convert(model: PreTrainedModel, tensors: Mapping[str, Any], config: Any) -> Any:
    """Convert tensors on disk and set them in the model; gives Transformers' loading info."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    with quietly():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    return info
