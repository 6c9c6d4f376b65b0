"""Random selections that a model's routing can serve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.selection.method import read_routed
from shape_moe.selection.selection import Selection, whole_selection


def random_selection(snapshot: Snapshot, routed: str, kind: str, *, seed: int = 0) -> Selection:
    """A selection with ``ragged`` or ``equal`` counts of about half the experts, routed as ``Method.routed`` spells."""
    routing, gate_scale = read_routed(routed)
    rng = np.random.default_rng(seed)
    moe = snapshot.moe
    groups = moe.routing.groups if routing == "reroute" else 1
    floor = moe.routing.floor if routing == "reroute" else 1
    size = moe.num_experts // groups
    layers = {}
    for row, layer in enumerate(snapshot.moe_layers):
        count = max(floor, moe.num_experts // 2) // groups
        if kind == "ragged":
            count = min(size, count + row)
        per_group = [group * size + rng.choice(size, count, replace=False) for group in range(groups)]
        layers[layer] = sorted(int(expert) for ids in per_group for expert in ids)
    return Selection(
        fingerprint=None,
        model=None,
        family=moe.family.model_type,
        scorer="random",
        rule="uniform",
        routing=routing,
        gate_scale=gate_scale,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        layers=layers,
        keep_asked=0.5,
    )


def seven_of_eight() -> Selection:
    """Of the embedded model, seven of eight experts and ragged: it still knows its tasks, but not quite."""
    layers = {layer: [expert for expert in range(32) if (expert + layer) % 8] for layer in range(4)}
    layers[0] = layers[0][:-1]
    return replace(whole_selection(range(4), 32), layers=layers, top_k=4, keep_asked=0.875)
