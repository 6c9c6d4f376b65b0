"""MoE models whose layers keep different numbers of experts, for Transformers.

This file travels inside pruned checkpoints, where ``trust_remote_code=True`` finds it, so it imports nothing but torch
and transformers. A pruned checkpoint's ``config.json`` is that of the original model plus ``shape_pruning``::

    {"version": 2, "routing": "drop" | "reroute", "gate_scale": "survivors" | "trained", "num_experts": E,
     "modules": {"experts": "mlp.experts", "router": "mlp.gate"}, "layers": {"0": [kept ids], ...},
     "rows": {"whole": [router tensors without a row per expert],
              "block": "mlp", "block_rows": [tensors of the block with one]}}   # where a family has such

The model is built as usual (on the meta device when it is loaded), and then every listed layer's experts, and under
``reroute`` its router, are cut down to the kept ones. Under ``drop`` the router stays whole, and slots of pruned
experts get weight zero. Under ``reroute`` with gate scale ``trained`` the router chooses among the kept experts and
stays whole as well: the softmax that gives their weights is that over all experts. Version 1 knew no gate scale and
means ``survivors``. The experts keep their class, and with it Transformers' fast implementations
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
VERSION = 2


def prune_in_place(model: nn.Module, pruning: dict[str, Any]) -> None:
    """Cut a full-size model down to the experts that ``pruning`` keeps.

    Args:
        model: the model, with real weights or on the meta device.
        pruning: the content of ``shape_pruning``.

    Raises:
        ValueError: for a newer format, or when a layer of the description is not in the model.
    """
    routing, gate_scale = pruning.get("routing"), pruning.get("gate_scale", "survivors")
    known = routing in ("drop", "reroute") and gate_scale in ("survivors", "trained")
    if pruning.get("version") not in (1, VERSION) or not known:
        raise ValueError("This pruned checkpoint was written in a newer format: update shape-moe.")
    wanted = {int(layer): ids for layer, ids in pruning["layers"].items()}
    total, rows = pruning["num_experts"], pruning.get("rows", {})
    for name, module in list(model.named_modules()):
        match = re.search(r"(?:^|\.)layers\.(\d+)$", name)
        experts: Any = _child(module, pruning["modules"]["experts"]) if match else None
        ids = wanted.pop(int(match[1]), None) if match and experts is not None else None
        if ids is None:
            continue
        _cut(experts, dict.fromkeys(_own_rows(experts, total), 0), ids)
        if routing == "reroute":
            router: Any = module.get_submodule(pruning["modules"]["router"])
            whole = tuple(rows.get("whole", ()))
            if gate_scale == "survivors":
                found = router_rows(router, total, whole)
                _cut(router, {name: _dimension(tensor, total) for name, tensor in found.items()}, ids)
                if rows.get("block_rows"):
                    _cut(module.get_submodule(rows["block"]), dict.fromkeys(rows["block_rows"], 0), ids)
            else:
                router.__class__ = _keeping_scale(type(router))
                router.kept_ids, router.total_experts, router.whole_tensors = list(ids), total, whole
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


def _cut(module: nn.Module, rows: dict[str, int], ids: list[int]) -> None:
    """Cut tensors, named with the dimension along which experts lie, down to those of the kept experts."""
    for name, dimension in rows.items():
        path, _, key = name.rpartition(".")
        holder: Any = module.get_submodule(path)
        tensor = getattr(holder, key)
        kept = tensor.detach().index_select(dimension, torch.tensor(ids, device=tensor.device))
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(holder, key, nn.Parameter(kept, requires_grad=tensor.requires_grad) if is_parameter else kept)
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


def router_rows(router: nn.Module, total: int, whole: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """A router's parameters and buffers with one row per expert, or one column where there is but one row, by name.

    Args:
        router: the router.
        total: number of experts.
        whole: names of tensors that are no such, whatever their shape.
    """
    tensors = [*router.named_parameters(), *router.named_buffers()]
    shaped = [(n, t) for n, t in tensors if t.shape[:1] == (total,) or t.shape == (1, total)]
    return {name: tensor for name, tensor in shaped if name not in whole}


def _dimension(tensor: torch.Tensor, total: int) -> int:
    return 0 if tensor.shape[:1] == (total,) else 1


def choose_among(
    router: Any,
    forward: Any,
    kept: torch.Tensor,
    total: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    whole: Sequence[str] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a whole router answers when it chooses among the kept experts alone.

    Args:
        router: the router, with a row for each of ``total`` experts.
        forward: its own forward, bound to it.
        kept: int [K], ids of the kept experts, ascending, on the router's device.
        total: experts before pruning.
        args: what the router was called with.
        kwargs: the same by name; a bias of one number per expert is cut as the router's own tensors are.
        whole: names of the router's tensors that have no row per expert, whatever their shape.

    Returns:
        Logits of the kept experts, weights by the softmax over these, and places in ``kept``.
    """
    inner: Any = nn.Module()  # lets functional_call swap the router's tensors for the time of a call
    inner.router, inner.forward = router, forward
    rows = {
        f"router.{name}": tensor.index_select(_dimension(tensor, total), kept.to(tensor.device))
        for name, tensor in router_rows(router, total, whole).items()
    }

    def cut(argument: Any) -> Any:
        return argument[kept.to(argument.device)] if getattr(argument, "shape", None) == (total,) else argument

    args = tuple(cut(argument) for argument in args)
    kwargs = {name: cut(argument) for name, argument in kwargs.items()}
    counted = hasattr(router, "num_experts")
    if counted:
        router.num_experts = len(kept)
    try:
        logits, weights, places = torch.func.functional_call(inner, rows, args, kwargs)
    finally:
        if counted:
            router.num_experts = total
    return logits, weights, places


def at_trained_scale(weights: torch.Tensor, logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Gate weights as the softmax over all experts gives them, from those that the softmax over kept ones gives.

    Both softmaxes have the same numerators, so that the weights differ by the kept experts' share of the whole: the
    sum of their probabilities among all experts, one factor per token.

    Args:
        weights: [T, k], by the softmax over kept experts, times a constant.
        logits: [T, E], of all experts.
        kept: int [K], ids of the kept experts, on the same device.

    Returns:
        Weights [T, k] in the dtype that came in.
    """
    fine = torch.promote_types(logits.dtype, torch.float32)
    share = logits.to(fine).softmax(-1)[..., kept].sum(-1, keepdim=True)
    return (weights.to(fine) * share).to(weights.dtype)


def _keeping_scale(router_class: type[nn.Module]) -> type[nn.Module]:
    """The router class with a forward that chooses among kept experts, whose weights keep their trained size."""

    class KeepingScale(router_class):  # type: ignore[misc, valid-type]  # a base class known at run time
        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            everything, *_ = super().forward(*args, **kwargs)
            kept = self._kept(everything.device)
            logits, weights, places = choose_among(
                self, super().forward, kept, self.total_experts, args, kwargs, self.whole_tensors
            )
            return logits, at_trained_scale(weights, everything, kept), places

        def _kept(self, device: torch.device) -> torch.Tensor:
            # Built when first needed: a buffer that is not saved would come back empty from loading.
            kept: torch.Tensor | None = self.__dict__.get("_kept_rows")
            if kept is None or kept.device != device:
                kept = torch.tensor(self.kept_ids, dtype=torch.int64, device=device)
                self.__dict__["_kept_rows"] = kept
            return kept

    KeepingScale.__name__ = KeepingScale.__qualname__ = f"KeepingScale{router_class.__name__}"
    return KeepingScale


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
