"""A trace of any family the slow way: one token at a time, in float64, from what a plain forward pass shows.

What the experts add to the residual stream is written down here per family by hand (:mod:`support.family_joins`), and
the stream that it joins is the layer's output without it: neither comes from the package's facts.
"""

from __future__ import annotations

from typing import Any

import torch

from shape_moe.calibration.batches import PADDING, Batch
from support.family_models import EXPERTS, TinyFamily

NAMES = (
    "tokens",
    "gate",
    "norm",
    "gated_norm",
    "gated_norm_turned",
    "contribution",
    "contribution_relative",
)


@torch.no_grad()
def naive(model: Any, made: TinyFamily, batch: Batch, layers: list[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Some statistics by layer [E], summed over segments and folds; with ``residual_square`` and ``gram`` [E, E]."""
    seen: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
    handles = []
    for number in layers:
        place, kept = made.decoder_layer(model, number), seen[number]
        experts = made.experts(place)

        def keep_experts(_m: Any, args: Any, output: Any, kept: Any = kept) -> None:
            kept["hidden"], kept["ids"], kept["gates"] = (argument.clone() for argument in args)
            kept["routed"] = output.clone()

        def keep_layer(_m: Any, _args: Any, output: Any, kept: Any = kept) -> None:
            kept["out"] = (output[0] if isinstance(output, tuple) else output).clone()

        handles += [experts.register_forward_hook(keep_experts), place.register_forward_hook(keep_layer)]
        for name, module in place.named_modules():

            def keep_module(_m: Any, args: Any, output: Any, name: str = name, kept: Any = kept) -> None:
                kept[f"in:{name}"] = args[0] if args else None
                kept[f"out:{name}"] = output[0] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(keep_module))
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return {number: _layer(made, made.decoder_layer(model, number), seen[number], batch) for number in layers}


def _layer(made: TinyFamily, place: Any, kept: dict[str, Any], batch: Batch) -> dict[str, torch.Tensor]:
    experts = made.experts(place)
    sums = {name: torch.zeros(EXPERTS, dtype=torch.float64) for name in NAMES}
    sums["gram"] = torch.zeros(EXPERTS, EXPERTS, dtype=torch.float64)
    sums["residual_square"] = torch.zeros((), dtype=torch.float64)
    for token in range(len(kept["ids"])):
        if int(batch.segments[token]) == PADDING:
            continue
        joins = made.join(place, kept, token)
        h = joins.stream
        ids, gates = kept["ids"][token].tolist(), kept["gates"][token].double()
        outputs = [joins.reach(_expert(experts, i, kept["hidden"][token])) for i in ids]
        added = [gate * joins.scale * output for gate, output in zip(gates, outputs, strict=True)]
        y = sum(added)
        turned = 1 - torch.dot(h, h + y) / (h.norm() * (h + y).norm())
        sums["residual_square"] += h @ h
        for place_of, i in enumerate(ids):
            gate, norm, along = gates[place_of], outputs[place_of].norm(), added[place_of] @ y
            for name, value in zip(
                NAMES, (1, gate, norm, gate * norm, gate * norm * turned, along, along / (h @ h)), strict=True
            ):
                sums[name][i] += value
            for other, j in enumerate(ids):
                sums["gram"][i, j] += (added[place_of] @ added[other]) / (h @ h)
    return sums


def _expert(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    transposed = experts.is_transposed

    def project(value: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(experts, name)[expert].double()
        found = value @ (weight if transposed else weight.T)
        return found + getattr(experts, f"{name}_bias")[expert].double() if experts.has_bias else found

    if experts.has_gate:
        value = experts._apply_gate(project(hidden.double(), "gate_up_proj"))
    else:
        value = experts.act_fn(project(hidden.double(), "up_proj"))
    return project(value, "down_proj")
