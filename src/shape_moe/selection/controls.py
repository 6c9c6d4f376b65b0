"""Controls: what a selection is compared with to see whether its values mean anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from shape_moe.scoring.scores import Scores
from shape_moe.selection.rules import layer_ranks
from shape_moe.selection.selection import Selection


def inverted_selection(selection: Selection, scores: Scores, *, groups: int = 1) -> Selection:
    """Remove the highest-valued experts instead, at the same count in every layer (and router group).

    A faithful value makes this selection much worse than the original.
    """
    ranks = layer_ranks(scores.values, scores.tiebreak)
    row_of = {layer: row for row, layer in enumerate(scores.layers)}

    def worst(layer: int, members: range, count: int) -> list[int]:
        return sorted(members, key=lambda expert: -int(ranks[row_of[layer], expert]))[:count]

    return _control(selection, f"{selection.scorer}, inverted", groups, worst)


def random_selection(selection: Selection, seed: int, *, groups: int = 1) -> Selection:
    """Remove experts at random, at the same count in every layer (and router group)."""
    rng = np.random.default_rng(seed)

    def drawn(_layer: int, members: range, count: int) -> list[int]:
        return [int(expert) for expert in rng.choice(np.asarray(members), size=count, replace=False)]

    return _control(selection, "random", groups, drawn)


def _control(selection: Selection, name: str, groups: int, pick: Callable[[int, range, int], list[int]]) -> Selection:
    """A selection of the same counts; ``pick`` names the experts of one layer's group."""
    size = selection.num_experts // groups
    layers = {}
    for layer, ids in selection.layers.items():
        members = [range(start, start + size) for start in range(0, selection.num_experts, size)]
        counts = [sum(expert in group for expert in ids) for group in members]
        chosen = [pick(layer, group, count) for group, count in zip(members, counts, strict=True)]
        layers[layer] = sorted(expert for part in chosen for expert in part)
    return replace(selection, layers=layers, scorer=name, alpha=None, mass_kept={}, stability=None)
