"""Samples of examples: of every class in turn, and evenly over each."""

from __future__ import annotations

import pytest

from shape_moe.evaluation.spread import spread_over_classes


@pytest.mark.parametrize(
    ("groups", "positions", "count", "chosen"),
    [
        ([None] * 9, range(9), 3, [0, 3, 6]),
        ([None] * 10, range(10), 4, [0, 2, 5, 7]),
        ("aaaabbbb", range(8), 4, [0, 2, 4, 6]),
        ("aaaabbbb", range(8), 3, [0, 2, 4]),  # the odd one goes to the class that comes first
        ("abbbbbbb", range(8), 4, [0, 1, 3, 5]),  # what one class does not have the others give
        ("aabbaabb", [1, 3, 5, 7], 2, [1, 3]),
        ("aabbaabb", [7, 5, 3, 1], 4, [1, 3, 5, 7]),
        (["", None, "", None], range(4), 2, [0, 2]),  # no name is one class
        ("ab", range(2), 0, []),
        ("ab", range(2), 9, [0, 1]),
        ("ab", [], 3, []),
    ],
)
def test_positions_that_are_chosen(groups, positions, count, chosen) -> None:
    assert spread_over_classes(list(groups), list(positions), count) == chosen
