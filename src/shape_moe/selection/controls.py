"""Controls: what a selection is compared with to see whether its values mean anything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shape_moe.scoring.scores import Scores
from shape_moe.selection.rules import layer_ranks
from shape_moe.selection.selection import Selection, layers_from_mask


def inverted_selection(selection: Selection, scores: Scores) -> Selection:
    """Remove the highest-valued experts instead, at the same count in every layer.

    A faithful value makes this selection much worse than the original.
    """
    ranks = layer_ranks(scores.values, scores.activations)
    counts = np.array([len(selection.layers[layer]) for layer in scores.layers])
    mask = ranks >= scores.num_experts - counts[:, None]
    layers = layers_from_mask(scores.layers, mask)
    return replace(
        selection, layers=layers, scorer=f"{selection.scorer}, inverted", alpha=None, mass_kept={}, stability=None
    )


def random_selection(selection: Selection, seed: int) -> Selection:
    """Remove experts at random, at the same count in every layer."""
    rng = np.random.default_rng(seed)
    layers = {
        layer: sorted(rng.choice(selection.num_experts, size=len(ids), replace=False).tolist())
        for layer, ids in selection.layers.items()
    }
    return replace(selection, layers=layers, scorer="random", alpha=None, mass_kept={}, stability=None)
