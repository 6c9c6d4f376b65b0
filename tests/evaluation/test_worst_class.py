"""What a selection loses by its worst class, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from shape_moe.evaluation.intervals import Bootstrap
from shape_moe.evaluation.worst_class import WorstClass


def test_the_worst_class_decides_and_not_the_mean() -> None:
    groups, tokens = ["a", "a", "b", None], [10, 30, 20, 0]
    found = WorstClass(groups, tokens, Bootstrap(4))
    assert found.names == ("a", "b")
    losses = [1.0, 3.0, 5.0, 9.0]
    assert found.losses(losses) == {"a": 4 / 40, "b": 5 / 20}
    assert found.worst(losses) == 0.25
    assert found.behind(losses, [0.0, 20.0, 0.0, 0.0]).value == pytest.approx(0.25 - 0.5)


def test_intervals_are_those_of_a_plain_loop_over_resamples() -> None:
    rng = np.random.default_rng(1)
    groups = list(rng.choice(["a", "b", "c"], size=30))
    tokens, ours, theirs = rng.integers(1, 9, 30), rng.gamma(1.0, size=30), rng.gamma(1.5, size=30)
    draws = Bootstrap(30, seed=3)
    differences = []
    for weights in draws.weights:
        worst = []
        for losses in (ours, theirs):
            classes = []
            for name in "abc":
                rows = [i for i, group in enumerate(groups) if group == name and weights[i] > 0]
                if rows:
                    below = sum(weights[i] * tokens[i] for i in rows)
                    classes.append(sum(weights[i] * losses[i] for i in rows) / below)
            worst.append(max(classes))
        differences.append(worst[0] - worst[1])
    found = WorstClass(groups, tokens, draws).behind(ours, theirs)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))), rel=1e-9)


def test_a_selection_is_not_behind_itself() -> None:
    losses = [0.5, 0.1, 0.9]
    found = WorstClass([None] * 3, [1, 2, 3], Bootstrap(3)).behind(losses, losses)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_resamples_without_tokens_are_left_out() -> None:
    tokens, draws = [5, 0, 0], Bootstrap(3)
    assert (draws.weights[:, 0] == 0).any()
    found = WorstClass([None] * 3, tokens, draws).behind([2.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    assert (found.value, found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2))
