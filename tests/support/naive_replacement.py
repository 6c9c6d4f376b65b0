"""Replacement the slow way: take one expert out, route its tokens again, and run what they are routed to in float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch

from shape_moe.architectures.moe_config import MoeConfig, read_moe_config
from shape_moe.calibration.batches import FOLDS, PADDING, Batch
from support.naive_trace import Captured, _next_is_response, capture, expert_output
from support.tiny_models import moe_block, router_of


@dataclass
class Rerouted:
    """Experts and weights of one token without one of its experts."""

    ids: list[int]
    survivors: list[float]
    trained: list[float]


def without_row(router: torch.nn.Module, expert: int) -> torch.nn.Module:
    """The router of a model that never had this expert; one expert less per token where too few are left."""
    smaller = copy.deepcopy(router)
    rows = [row for row in range(router.num_experts) if row != expert]
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        value = tensor.detach()[rows].clone()
        if name in dict(router.named_buffers()):
            setattr(smaller, name, value)
        else:
            setattr(smaller, name, torch.nn.Parameter(value))
    smaller.num_experts = len(rows)
    smaller.top_k = min(router.top_k, len(rows))
    return smaller


def reroute(router: torch.nn.Module, moe: MoeConfig, hidden: torch.Tensor, expert: int) -> Rerouted:
    """Really route a token again, the expert's row being gone (any expert may be chosen)."""
    logits = router(hidden[None])[0][0].double()
    _, weights, ids = without_row(router, expert)(hidden[None])
    names = [i if i < expert else i + 1 for i in ids[0].tolist()]
    survivors = weights[0].tolist()
    shrink = float(1 - logits.softmax(-1)[expert]) if moe.has_gate_scale else 1.0
    return Rerouted(names, survivors, [weight * shrink for weight in survivors])


def reroute_in_groups(router: torch.nn.Module, moe: MoeConfig, hidden: torch.Tensor, expert: int) -> Rerouted:
    """Route a token again within the groups that it has chosen with all experts there."""
    logits = router(hidden[None])[0][0].double()
    sigmoid = moe.family.router_scores == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    choice = scores + router.e_score_correction_bias.double() if sigmoid else scores
    size = moe.num_experts // moe.groups.count
    of_group = [sorted(choice[g * size : (g + 1) * size].tolist(), reverse=True) for g in range(moe.groups.count)]
    value = [sum(found[:2]) if sigmoid else found[0] for found in of_group]
    groups = sorted(range(moe.groups.count), key=lambda g: -value[g])[: moe.groups.used]
    allowed = [i for i in range(moe.num_experts) if i // size in groups and i != expert]
    ids = sorted(allowed, key=lambda i: -float(choice[i]))[: moe.top_k]
    total = sum(float(scores[i]) for i in ids) if moe.renormalises else 1.0
    trained = [float(scores[i]) / total * router.routed_scaling_factor for i in ids]
    grow = float(1 - scores[expert]) if moe.has_gate_scale else 1.0
    return Rerouted(ids, [weight / grow for weight in trained], trained)


@torch.no_grad()
def naive_replacement(model, batches: list[Batch]) -> dict[int, dict[str, np.ndarray]]:
    """``replacement``, ``replacement_trained`` and ``size`` by layer, [4, folds, E].

    ``size`` is what an inner product of that expert's change may be as large as: rounding is relative to it.
    """
    moe = read_moe_config(model.config.to_dict())
    again = reroute if moe.groups is None else reroute_in_groups
    totals: dict[int, dict[str, np.ndarray]] = {}
    for batch in batches:
        for layer, captured in capture(model, batch).items():
            sums = totals.setdefault(
                layer,
                {n: np.zeros((4, FOLDS, moe.num_experts)) for n in ("replacement", "replacement_trained", "size")},
            )
            for token in range(len(captured.ids)):
                segment, fold = int(batch.segments[token]), int(batch.folds[token])
                if segment == PADDING:
                    continue
                cell = 2 * segment + int(_next_is_response(batch, token))
                for i, found in _token(model.model.layers[layer], moe, captured, token, again).items():
                    for name, value in found.items():
                        sums[name][cell, fold, i] += value
    return totals


def _token(layer, moe: MoeConfig, captured: Captured, token: int, again) -> dict[int, dict[str, float]]:
    block, router = moe_block(layer), router_of(layer)
    scale, h = moe.residual_scale, captured.residual[token].double()
    hidden = captured.hidden[token]
    outputs: dict[int, torch.Tensor] = {}

    def output(expert: int) -> torch.Tensor:
        if expert not in outputs:
            outputs[expert] = expert_output(block.experts, expert, hidden)
        return outputs[expert]

    ids, gates = captured.ids[token].tolist(), captured.gates[token].double().tolist()
    y = sum(g * output(i) for g, i in zip(gates, ids, strict=True))
    found = {}
    for i in ids:
        new = again(router, moe, hidden, i)
        result = {}
        for name, weights in (("replacement", new.survivors), ("replacement_trained", new.trained)):
            after = sum((w * output(j) for w, j in zip(weights, new.ids, strict=True)), torch.zeros_like(y))
            result[name] = float((scale * (after - y)).square().sum() / (h @ h))
        before = sum(g * float(output(j).norm()) for g, j in zip(gates, ids, strict=True))
        after = sum(w * float(output(j).norm()) for w, j in zip(new.survivors, new.ids, strict=True))
        result["size"] = (scale * (before + after)) ** 2 / float(h @ h)
        found[i] = result
    return found
