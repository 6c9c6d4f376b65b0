"""A selection as a reversible mask on a live model: the model behaves as if pruned, and is given back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.sites import MoeSite, find_sites, live_moe_config
from shape_moe.pruning.down_projections import RefittedSelection, Weights, replaced_rows
from shape_moe.selection.method import Routing
from shape_moe.selection.selection import Selection, check_against_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@contextmanager
def masked(
    model: PreTrainedModel, selection: Selection, routing: Routing | None = None, weights: Weights | None = None
) -> Iterator[PreTrainedModel]:
    """Make a live model behave as if a selection had been applied to it.

    Args:
        model: the full model.
        selection: what to keep; layers that it does not name keep everything.
        routing: ``drop`` or ``reroute``, the latter with the selection's gate scale; None for the selection's own.
        weights: refitted down projections by layer (see :func:`shape_moe.refit`); None for those that the selection
            brings along, else the model's own.

    Raises:
        UsageError: when the selection or the weights do not fit the model.
    """
    import torch

    routing = routing or selection.routing
    if weights is None and isinstance(selection, RefittedSelection):
        weights = selection.weights
    sites = matching_sites(model, selection, routing)
    whole = live_moe_config(model).family.router_whole
    handles: list[Any] = []
    try:
        for site, ids in sites:
            kept = torch.tensor(ids)
            if routing == "drop":
                handles.append(site.experts.register_forward_pre_hook(_zero_dropped(kept, selection.num_experts)))
            else:
                handles.append(_Rerouted(site, kept, selection, whole))
            if weights is not None and site.layer in weights:
                handles.append(replaced_rows(site, ids, weights[site.layer]))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def matching_sites(
    model: PreTrainedModel, selection: Selection, routing: Routing | None = None
) -> list[tuple[MoeSite, list[int]]]:
    """The MoE layers of a model with the ids that a selection keeps in each.

    Raises:
        UsageError: when the selection does not fit the model, or the routing cannot serve it.
    """
    sites = find_sites(model)
    check_against_model(selection, live_moe_config(model), [site.layer for site in sites], routing or selection.routing)
    return [(site, selection.layers[site.layer]) for site in sites if site.layer in selection.layers]


def _zero_dropped(kept: torch.Tensor, total: int) -> Any:
    import torch

    alive = torch.zeros(total, dtype=torch.bool)
    alive[kept] = True
    by_device: dict[torch.device, torch.Tensor] = {}

    def hook(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, weights = args
        if ids.device not in by_device:
            by_device[ids.device] = alive.to(ids.device)
        keep = by_device[ids.device][ids]
        return hidden, ids, torch.where(keep, weights, torch.zeros_like(weights))

    return hook


class _Rerouted:
    """A router that runs with the kept rows alone; its ids are translated back to those of the full model."""

    def __init__(self, site: MoeSite, kept: torch.Tensor, selection: Selection, whole: Sequence[str]) -> None:
        self.router: Any = site.router
        self.kept, self.total, self.gate_scale = kept, selection.num_experts, selection.gate_scale
        self.whole = whole
        # accelerate loads offloaded weights in a forward of its own and keeps the model's under another name
        self.attribute = "_old_forward" if hasattr(self.router, "_hf_hook") else "forward"
        self.forward: Any = getattr(self.router, self.attribute)
        self.replaced = self.router.__dict__.get(self.attribute)
        setattr(self.router, self.attribute, self._forward)

    def _forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from shape_moe.pruning.modeling_shape_moe import at_trained_scale, choose_among, router_rows

        device = next(iter(router_rows(self.router, self.total, self.whole).values())).device
        kept = self.kept.to(device)
        logits, weights, places = choose_among(self.router, self.forward, kept, self.total, args, kwargs, self.whole)
        if self.gate_scale == "trained":
            everything, *_ = self.forward(*args, **kwargs)
            weights = at_trained_scale(weights, everything, kept)
        return logits, weights, kept[places]

    def remove(self) -> None:
        if self.replaced is None:
            delattr(self.router, self.attribute)
        else:
            setattr(self.router, self.attribute, self.replaced)
