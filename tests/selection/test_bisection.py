"""The paper's bisection, step by step, and chunks that enter by their first member."""

from __future__ import annotations

import numpy as np
import pytest

from shape_moe.selection.budget import Constraints, choose
from shape_moe.selection.rules import bisection_budget, global_priority
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.stability import stability
from support.data import synthetic_trace

EIGHTHS = np.arange(8)[None] / 8
"""Keeping everything below alpha keeps 8 alpha of them, rounded up."""


@pytest.mark.parametrize(
    ("keep", "tolerance", "kept"),
    [
        (0.25, 0.25, 4),  # the first step, alpha 1/2, ends within the tolerance, its ends included
        (0.25, 0.2, 2),  # too many, so that alpha 1/4 follows
        (0.75, 0.25, 4),  # alpha 1/2 again, and not 1, which would be as close
        (0.75, 0.2, 6),  # too few, so that alpha 3/4 follows
        (0.5, 0.125, 4),  # alpha 1/2 does not keep the expert at 1/2
        (0.375, 0.1, 3),  # 1/2, 1/4, 3/8
        (0.9, 0.05, 7),  # 1/2, 3/4, 7/8
        (1.0, 0.01, 8),  # 1/2, 3/4, 7/8, 15/16
    ],
)
def test_every_step_halves_what_is_left(keep, tolerance, kept) -> None:
    assert bisection_budget(EIGHTHS, keep, tolerance) == kept


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (2, [[1, 1, 0, 0], [0, 0, 0, 0]]),
        (4, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (6, [[1, 1, 0, 0], [1, 1, 1, 1]]),
        (8, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_chunks_enter_by_their_first_member(budget, kept) -> None:
    """Pairs by rank: layer 0 (10, 1) and (0.9, 0.8), layer 1 (5, 4) and (3, 2)."""
    priority = global_priority(np.array([[10.0, 1.0, 0.9, 0.8], [5.0, 4.0, 3.0, 2.0]]))
    found = choose(priority, budget, Constraints(floor=0, multiple_of=2))
    assert found.astype(int).tolist() == kept


def test_chunks_of_groups_enter_by_the_better_of_their_first_members() -> None:
    """Two router groups of two: what layer 0 offers next is (9, 1), what layer 1 offers next is (5, 4)."""
    priority = global_priority(np.array([[9.0, 0.5, 1.0, 0.4], [5.0, 3.0, 4.0, 2.0]]))
    found = choose(priority, 2, Constraints(floor=0, groups=2))
    assert found.astype(int).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


def test_the_halves_of_the_data_choose_at_the_budget_of_the_whole() -> None:
    """A bisection of their own would end at another one, and then they could not be compared."""
    told_apart = 0
    for seed in range(12):
        trace = synthetic_trace(layers=4, experts=16, top_k=3, tokens=400, seed=seed)
        options = SelectOptions(keep=0.5, tolerance=0.1)
        selection = select_from_trace(trace, options)
        same = SelectOptions(keep=selection.keep)
        masks = [select_from_trace(trace.half(half), same).mask() for half in (0, 1)]
        assert selection.stability == stability(*masks)
        own = [select_from_trace(trace.half(half), options).mask() for half in (0, 1)]
        told_apart += stability(*own) != stability(*masks)
    assert told_apart > 0
