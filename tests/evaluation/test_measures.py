"""Figures of answers and of classes: their intervals hold together with all others, and the worst class is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.intervals import Bootstrap, Estimate
from shape_moe.evaluation.measures import Figures, by_group, health, worst_group
from shape_moe.evaluation.teacher_forced import TeacherForced
from support.held_out import random_set

COUNT = 40


def answers(seed: int) -> Generated:
    rng = np.random.default_rng(seed)
    ended, looped, exact = (rng.random(COUNT) < share for share in (0.8, 0.2, 0.6))
    written = tuple((5,) * int(length) for length in rng.integers(5, 20, COUNT))
    return Generated(tuple(range(COUNT)), written, 50, ended, looped, exact)


def test_intervals_of_answers_hold_for_all_candidates_together() -> None:
    made, dense = answers(0), answers(1)
    one, many = (health(made, dense, Bootstrap(200, comparisons=count)) for count in (1, 16))
    for narrow, wide in zip(
        [*one.figures.values(), *one.change.values()], [*many.figures.values(), *many.change.values()], strict=True
    ):
        assert narrow.value == wide.value
        assert wide.low < narrow.low < narrow.high < wide.high
    assert many.complaints == one.complaints


def test_intervals_of_answers_are_drawn_by_the_seed() -> None:
    found = [health(answers(0), None, Bootstrap(200, seed)).figures["length"] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_intervals_of_classes_hold_for_all_candidates_together() -> None:
    held_out, rng = random_set(20), np.random.default_rng(0)
    count = len(held_out.examples)
    tokens = np.full(count, 10)
    tokens[-1] = 0
    dense = TeacherForced(tokens, rng.random(count), np.zeros(count), tokens, rng.random(count) < 0.9)
    other = replace(dense, nll=rng.random(count), kl=rng.random(count), exact=rng.random(count) < 0.5)
    one, many = (by_group(held_out, other, dense, Bootstrap(count, 3, comparisons)) for comparisons in (1, 16))
    assert set(one) == set(many) == {"odd", "even"}
    odd = [i for i, name in enumerate(held_out.groups) if name == "odd" and tokens[i]]
    assert one["odd"]["quality"]["nll"].value == pytest.approx(other.nll[odd].sum() / tokens[odd].sum())
    for group in one:
        narrow, wide = one[group]["change"]["nll"], many[group]["change"]["nll"]
        assert wide.low < narrow.low < narrow.high < wide.high


def group(nll: float, exact: float | None = None) -> dict[str, Figures]:
    change = {"nll": Estimate(nll, nll, nll)}
    if exact is not None:
        change["exact_match"] = Estimate(exact, exact, exact)
    return {"quality": {}, "change": change}


def test_the_worst_class_comes_with_the_figure_that_says_so() -> None:
    assert worst_group({}) is None
    assert worst_group({"a": group(0.1, -0.5), "b": group(0.9, -0.1)}) == ("a", "exact_match")
    assert worst_group({"a": group(0.1, -0.5), "b": group(0.9)}) == ("b", "nll")
