"""The published Qwen3-30B-A3B values give the published selections."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shape_moe.scoring.scores import read_scores
from shape_moe.selection.select import SelectOptions, select_from_scores


def published(folder: Path, keep: float) -> dict[int, list[int]]:
    document = json.loads((folder / f"gsm8k_selected_experts_keep{keep}.json").read_text())
    return {int(layer): ids for layer, ids in document.items() if layer.isdigit()}


@pytest.mark.parametrize("keep", [0.6, 0.8])
def test_tolerance_gives_the_published_selection(reference: Path, keep: float) -> None:
    scores = read_scores(reference / "gsm8k_shapley_values.csv")
    selection = select_from_scores(scores, SelectOptions(keep=keep, tolerance=0.01))
    assert selection.layers == published(reference, keep)


@pytest.mark.parametrize(("keep", "budget"), [(0.6, 3686), (0.8, 4915)])
def test_without_tolerance_the_budget_is_exact(reference: Path, keep: float, budget: int) -> None:
    scores = read_scores(reference / "gsm8k_shapley_values.csv")
    selection = select_from_scores(scores, SelectOptions(keep=keep))
    assert selection.kept == budget
    assert selection.alpha is not None


def test_no_unused_expert_is_kept_before_a_used_one(reference: Path) -> None:
    scores = read_scores(reference / "gsm8k_shapley_values.csv")
    mask = select_from_scores(scores, SelectOptions(keep=0.95)).mask()
    used = scores.activations > 0
    assert (~used).sum() == 216
    for row in range(len(mask)):
        dropped_used = (~mask[row] & used[row]).any()
        kept_unused = (mask[row] & ~used[row]).any()
        assert not (dropped_used and kept_unused)


def test_alpha_reproduces_the_selection(reference: Path) -> None:
    from shape_moe.selection.rules import coverage_priority

    scores = read_scores(reference / "gsm8k_shapley_values.csv")
    selection = select_from_scores(scores, SelectOptions(keep=0.6))
    tau = coverage_priority(scores.values, scores.activations)
    assert np.array_equal(selection.alpha > tau, selection.mask())
