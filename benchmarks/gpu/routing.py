"""Routers of random models, set such that as many slots survive as a calibrated task shows; chance keeps far fewer."""

from __future__ import annotations

from typing import Any

import torch

from shape_moe.architectures.sites import find_sites
from shape_moe.selection.selection import Selection


def nested_sets(experts: int, layers: list[int], keep_rates: list[float]) -> dict[float, dict[int, list[int]]]:
    """Kept experts by keep rate and layer, ragged, each smaller set within the larger; counts meet the rates."""
    generator = torch.Generator().manual_seed(0)
    orders = {layer: torch.randperm(experts, generator=generator).tolist() for layer in layers}
    shift = max(1, experts // 16)
    kept: dict[float, dict[int, list[int]]] = {}
    for keep in keep_rates:
        counts = [round(keep * experts) + (shift if i % 2 else -shift) for i in range(len(layers))]
        if len(layers) % 2:
            counts[-1] += shift
        kept[keep] = {layer: sorted(orders[layer][:count]) for layer, count in zip(layers, counts, strict=True)}
    return kept


def router_inputs(model: Any, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """What every router sees on a batch, float32 [tokens, hidden]."""
    seen: dict[int, torch.Tensor] = {}
    handles = []
    for site in find_sites(model):

        def keep(_module: Any, args: tuple[Any, ...], layer: int = site.layer) -> None:
            seen[layer] = args[0].detach().reshape(-1, args[0].shape[-1]).float()

        handles.append(site.router.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return seen


def set_survival(
    model: Any, ids: torch.Tensor, kept: dict[float, dict[int, list[int]]], wanted: dict[float, float], top_k: int
) -> dict[int, torch.Tensor]:
    """Scale the rows of every router until the wanted number of slots falls on the kept sets of each rate.

    Layers are set in order, each on what it sees once those before it are set.

    Returns:
        The factors on every layer's rows, for :func:`scale_routers` on the same model built again.
    """
    found: dict[int, torch.Tensor] = {}
    for site in find_sites(model):
        hidden = router_inputs(model, ids)[site.layer]
        logits = hidden @ site.router.weight.detach().float().T
        rates = sorted(kept, reverse=True)
        masks = {keep: _mask(kept[keep][site.layer], logits) for keep in rates}
        scales = torch.ones(logits.shape[1], device=logits.device)
        for _ in range(3):  # the groups of experts depend on each other a little
            for i, keep in enumerate(rates):
                rows = ~masks[keep] & (masks[rates[i - 1]] if i else torch.ones_like(masks[keep]))
                _bisect(logits, scales, rows, masks[keep], wanted[keep], top_k)
        found[site.layer] = scales
        scale_routers(model, {site.layer: scales})
    return found


def scale_routers(model: Any, scales: dict[int, torch.Tensor]) -> None:
    """Multiply the rows of routers by factors, by layer."""
    for site in find_sites(model):
        if site.layer in scales:
            weight = site.router.weight
            with torch.no_grad():
                weight.mul_(scales[site.layer][:, None].to(weight.dtype))


def _mask(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    mask[torch.tensor(ids, device=logits.device)] = True
    return mask


def _bisect(
    logits: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, wanted: float, top_k: int
) -> None:
    low, high = 0.0, 1.0
    for _ in range(20):
        scales[rows] = (low + high) / 2
        survive = mask[(logits * scales).topk(top_k, dim=-1).indices].sum(-1).float().mean().item()
        low, high = (low, (low + high) / 2) if survive < wanted else ((low + high) / 2, high)


def surviving_slots(model: Any, ids: torch.Tensor, selection: Selection, top_k: int) -> float:
    """Slots per token that fall on kept experts, counted in a forward pass of the full model."""
    shares: list[torch.Tensor] = []
    handles = []
    for site in find_sites(model):
        alive = torch.zeros(selection.num_experts, dtype=torch.bool, device=ids.device)
        alive[torch.tensor(selection.layers[site.layer], device=ids.device)] = True

        def count(_module: Any, args: tuple[Any, ...], alive: torch.Tensor = alive) -> None:
            shares.append(alive[args[1]].float().mean())

        handles.append(site.experts.register_forward_pre_hook(count))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return top_k * float(torch.stack(shares).mean())
