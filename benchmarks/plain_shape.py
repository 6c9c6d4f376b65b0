"""The SHAPE formula in plain Python, dictionary by dictionary: what one would write first."""

from __future__ import annotations

from math import comb


def shape_values(coalitions: list[tuple[int, ...]], counts: list[int], num_experts: int) -> list[float]:
    """SHAPE values of one layer; see :func:`shape_moe.scoring.shape.shape_values` for the formula."""
    worth: dict[tuple[int, ...], int] = {}
    for members, count in zip(coalitions, counts, strict=True):
        key = tuple(sorted(members))
        worth[key] = worth.get(key, 0) + count
    containing: dict[tuple[int, ...], int] = {}
    for members, count in worth.items():
        for i in range(len(members)):
            rest = members[:i] + members[i + 1 :]
            containing[rest] = containing.get(rest, 0) + count
    alpha: dict[int, float] = {}
    for members, count in worth.items():
        for i, expert in enumerate(members):
            share = count / containing[members[:i] + members[i + 1 :]]
            if share < alpha.get(expert, 2.0):
                alpha[expert] = share
    values = [0.0] * num_experts
    for members, count in worth.items():
        for i, expert in enumerate(members):
            values[expert] += count - alpha[expert] * containing[members[:i] + members[i + 1 :]]
    top_k = len(coalitions[0])
    factor = 1 / (top_k * comb(num_experts, top_k))
    return [factor * value for value in values]
