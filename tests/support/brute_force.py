"""Slow and plain readings of the formulas: what the fast code is tested against."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import factorial

import numpy as np


def shape_values(coalitions, counts, num_experts) -> list[Fraction]:
    """The SHAPE formula word by word, over sets and exact fractions."""
    v: dict[frozenset[int], Fraction] = {}
    for row, count in zip(coalitions, counts, strict=True):
        key = frozenset(int(e) for e in row)
        v[key] = v.get(key, Fraction(0)) + Fraction(count)
    v = {key: count for key, count in v.items() if count > 0}
    if not v:
        return [Fraction(0)] * num_experts
    k = len(next(iter(v)))
    factor = Fraction(factorial(k - 1) * factorial(num_experts - k), factorial(num_experts))
    values = []
    for expert in range(num_experts):
        own = [a for a in v if expert in a]
        if not own:
            values.append(Fraction(0))
            continue
        containing = {a: sum((v[b] for b in v if a - {expert} <= b), Fraction(0)) for a in own}
        alpha = min(v[a] / containing[a] for a in own)
        values.append(factor * sum((v[a] - alpha * containing[a] for a in own), Fraction(0)))
    return values


def shapley_values(worth, players: int) -> np.ndarray:
    """Exact Shapley values from a function of sets, over all subsets."""
    values = np.zeros(players)
    for player in range(players):
        others = [p for p in range(players) if p != player]
        for size in range(players):
            weight = factorial(size) * factorial(players - size - 1) / factorial(players)
            for subset in combinations(others, size):
                values[player] += weight * (worth({*subset, player}) - worth(set(subset)))
    return values


def coverage_prefixes(values, alpha) -> list[set[int]]:
    """Per layer the shortest prefix by value whose mass reaches ``alpha`` of the layer's."""
    kept = []
    for row in values:
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        mass, chosen = 0.0, set()
        total = sum(max(v, 0.0) for v in row)
        for expert in order:
            if mass >= alpha * total:
                break
            chosen.add(expert)
            mass += max(row[expert], 0.0)
        kept.append(chosen)
    return kept
