"""MoE models whose layers keep different numbers of experts, for Transformers.

This file travels inside pruned checkpoints, where ``trust_remote_code=True`` finds it, so it imports nothing but torch
and transformers. A pruned checkpoint's ``config.json`` is that of the original model plus ``shape_pruning``::

    {"version": 1, "routing": "drop" | "reroute", "num_experts": E,
     "modules": {"experts": "mlp.experts", "router": "mlp.gate"}, "layers": {"0": [kept ids], ...},
     "rows": {"whole": [router tensors without a row per expert],
              "block": "mlp", "block_rows": [tensors of the block with one]}}   # where a family has such

The model is built as usual (on the meta device when it is loaded), and then every listed layer's experts, and under
``reroute`` its router, are cut down to the kept ones. Under ``drop`` the router stays whole, and slots of pruned
experts get weight zero. The experts keep their class, and with it Transformers' fast implementations
(``@use_experts_implementation``).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import conversion_mapping

PREFIX = "Shape"
VERSION = 1


def prune_in_place(model: nn.Module, pruning: dict[str, Any]) -> None:
    """Cut a full-size model down to the experts that ``pruning`` keeps.

    Args:
        model: the model, with real weights or on the meta device.
        pruning: the content of ``shape_pruning``.

    Raises:
        ValueError: for a newer format, or when a layer of the description is not in the model.
    """
    if pruning.get("version") != VERSION or pruning.get("routing") not in ("drop", "reroute"):
        raise ValueError("This pruned checkpoint was written in a newer format: update shape-moe.")
    wanted = {int(layer): ids for layer, ids in pruning["layers"].items()}
    total, rows = pruning["num_experts"], pruning.get("rows", {})
    for name, module in list(model.named_modules()):
        match = re.search(r"(?:^|\.)layers\.(\d+)$", name)
        experts: Any = _child(module, pruning["modules"]["experts"]) if match else None
        ids = wanted.pop(int(match[1]), None) if match and experts is not None else None
        if ids is None:
            continue
        _keep_rows(experts, [("", name, 0) for name in _own_rows(experts, total)], ids)
        if pruning["routing"] == "reroute":
            router = module.get_submodule(pruning["modules"]["router"])
            _keep_rows(router, rows_of(router, total, rows.get("whole", ())), ids)
            if rows.get("block_rows"):
                _keep_rows(module.get_submodule(rows["block"]), [("", name, 0) for name in rows["block_rows"]], ids)
        else:
            experts.__class__ = _dropping(type(experts))
            experts.kept_ids, experts.total_experts = list(ids), pruning["num_experts"]
    if wanted:
        raise ValueError(f"The model has no layers {sorted(wanted)}, which shape_pruning describes.")


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _own_rows(module: nn.Module, total: int) -> list[str]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [name for name, tensor in tensors if tensor.shape[:1] == (total,)]


def rows_of(module: nn.Module, total: int, whole: Sequence[str] = ()) -> list[tuple[str, str, int]]:
    """The tensors of a router with one row per expert, or one column where there is but one row.

    Args:
        module: the router.
        total: number of experts.
        whole: names of tensors that are no such, whatever their shape.

    Returns:
        The path of the module that holds each, its name there, and the dimension along which the experts lie.
    """
    found = []
    for path, child in module.named_modules():
        for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            if (f"{path}.{name}" if path else name) in whole:
                continue
            if tensor.shape[:1] == (total,):
                found.append((path, name, 0))
            elif tensor.shape == (1, total):
                found.append((path, name, 1))
    return found


def _keep_rows(module: nn.Module, rows: list[tuple[str, str, int]], ids: list[int]) -> None:
    """Cut tensors down to the rows of the kept experts."""
    for path, name, dimension in rows:
        holder: Any = module.get_submodule(path)
        tensor = getattr(holder, name)
        kept = tensor.detach().index_select(dimension, torch.tensor(ids, device=tensor.device))
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(holder, name, nn.Parameter(kept, requires_grad=tensor.requires_grad) if is_parameter else kept)
    counted: list[Any] = [child for child in module.modules() if hasattr(child, "num_experts")]
    for child in counted:
        child.num_experts = len(ids)


def _dropping(experts_class: type[nn.Module]) -> type[nn.Module]:
    """The experts class with a forward that takes ids of the full router and drops pruned experts' slots."""

    class DroppingExperts(experts_class):  # type: ignore[misc, valid-type]  # a base class known at run time
        def forward(
            self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            slot = self._slot_of(top_k_index.device)[top_k_index]
            alive = slot >= 0
            # A dropped slot repeats one of the token's surviving experts with weight zero: no output is computed
            # that the token would not have had anyway, so nothing can overflow.
            survivor = slot.gather(-1, alive.to(torch.int8).argmax(-1, keepdim=True)).clamp(min=0)
            weights = torch.where(alive, top_k_weights, torch.zeros_like(top_k_weights))
            output: torch.Tensor = super().forward(hidden_states, torch.where(alive, slot, survivor), weights)
            return output

        def _slot_of(self, device: torch.device) -> torch.Tensor:
            # Built when first needed: a buffer that is not saved would come back empty from loading.
            slots: torch.Tensor | None = self.__dict__.get("_slots")
            if slots is None or slots.device != device:
                slots = torch.full((self.total_experts,), -1, dtype=torch.int64)
                slots[self.kept_ids] = torch.arange(len(self.kept_ids))
                slots = slots.to(device)
                self.__dict__["_slots"] = slots
            return slots

    DroppingExperts.__name__ = DroppingExperts.__qualname__ = f"Dropping{experts_class.__name__}"
    return DroppingExperts


def pruned_class(stock: type[transformers.PreTrainedModel]) -> type[transformers.PreTrainedModel]:
    """The class of pruned models of a stock class: ``Qwen3MoeForCausalLM`` gives ``ShapeQwen3MoeForCausalLM``."""
    name = PREFIX + stock.__name__
    if name in globals():
        known: type[transformers.PreTrainedModel] = globals()[name]
        return known

    class Pruned(stock):  # type: ignore[misc]  # a base class known at run time
        _auto_class = (
            "AutoModelForCausalLM" if stock.__name__.endswith("ForCausalLM") else "AutoModelForImageTextToText"
        )

        def __init__(self, config: transformers.PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            _share_conversions(stock, type(self).__name__)
            super().__init__(config, *args, **kwargs)
            pruning = getattr(config, "shape_pruning", None)
            if pruning is None:
                raise ValueError(f"{name} loads pruned checkpoints, but this configuration has no shape_pruning.")
            prune_in_place(self, pruning)

        @classmethod
        def is_custom_code(cls) -> bool:
            """Whether names and layouts on disk are the class's own: they are those of the stock class.

            For custom code Transformers leaves out the conversions from disk to memory that belong to the model type.
            """
            own: bool = stock.is_custom_code()
            return own

        @classmethod
        def is_backend_compatible(cls) -> bool:
            """Servers that build models of Transformers around their own kernels give all layers one count."""
            return False

        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            # vLLM asks this too before it does so: it would serve garbage without an error.
            settable: bool = super()._can_set_attn_implementation()
            return settable and "vllm" not in sys.modules

    Pruned.__name__ = Pruned.__qualname__ = name
    Pruned.__doc__ = f"{stock.__name__} with the experts that ``config.shape_pruning`` keeps."
    globals()[name] = Pruned
    return Pruned


def _share_conversions(stock: type[transformers.PreTrainedModel], name: str) -> None:
    """Register the conversions that belong to a stock class by its name for the pruned class too.

    Those that belong to the model type are found by it; a class without its own must not be registered, because
    Transformers would then apply them a second time to the model inside.
    """
    own = conversion_mapping.get_checkpoint_conversion_mapping(stock.__name__)
    if own is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(name, own, overwrite=True)


def __getattr__(name: str) -> type[transformers.PreTrainedModel]:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(stock, type) or not issubclass(stock, transformers.PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")  # noqa: TRY004  # the protocol's error
    return pruned_class(stock)
