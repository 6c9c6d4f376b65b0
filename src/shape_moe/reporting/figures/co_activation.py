"""Numbers about coalitions: which experts serve tokens together, and what a selection leaves of a token's experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from shape_moe.selection.selection import Selection
from shape_moe.tracing.coalitions import CoalitionTable
from shape_moe.tracing.token_weights import TokenWeights
from shape_moe.tracing.trace import Trace

ENOUGH = 5.0
"""Pairs that should meet, and do meet, in fewer tokens than this are not judged: a meeting or two is no habit."""
_STEP = 0.05
_LIMIT = 126
NEVER, TOO_FEW, CHANCE = 0, 255, 127
"""Codes of pairs that never meet, of which too little is known, and that meet as often as chance would have it."""


def tokens_together(table: CoalitionTable, num_experts: int, weights: TokenWeights | None) -> NDArray[np.float64]:
    """How many tokens two experts serve together.

    Args:
        table: the layer's coalitions.
        num_experts: ``E``.
        weights: how much tokens count.

    Returns:
        float64 [E, E], symmetric; the diagonal holds the tokens of each expert.
    """
    counts = table.weighted(weights).astype(np.float64)
    columns = table.members.T
    alone = np.zeros(num_experts)
    flat = np.zeros(num_experts * num_experts)
    for column in columns:
        alone += np.bincount(column, weights=counts, minlength=num_experts)
    for first, second in combinations(columns, 2):
        flat += np.bincount(first * num_experts + second, weights=counts, minlength=len(flat))
    above = flat.reshape(num_experts, num_experts)
    return np.asarray(above + above.T + np.diag(alone))


def expected_together(together: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many tokens two experts would serve together if they met by their traffic alone.

    Proportional to the product of their tokens, with as many meetings over all pairs as there really are (``k`` experts
    of a token are all different, so a plain product of shares would be too high).

    Returns:
        float64 [E, E]; the diagonal is 0.
    """
    alone = np.diag(together)
    product = np.outer(alone, alone)
    np.fill_diagonal(product, 0)
    whole = product.sum()
    meetings = together.sum() - alone.sum()
    return np.asarray(product * (meetings / whole)) if whole > 0 else product


@dataclass(frozen=True)
class Meetings:
    """How often the experts of a layer meet.

    Attributes:
        together: float [E, E] from :func:`tokens_together`.
    """

    together: NDArray[np.float64]

    @cached_property
    def expected(self) -> NDArray[np.float64]:
        """:func:`expected_together`."""
        return expected_together(self.together)


@dataclass(frozen=True)
class Pair:
    """Two experts of a layer.

    Attributes:
        first: expert id.
        second: a larger expert id.
        tokens: tokens that both serve.
        expected: tokens that both would serve by their traffic alone.
    """

    first: int
    second: int
    tokens: float
    expected: float


def strongest_pairs(layer: Meetings, count: int) -> list[Pair]:
    """The pairs that meet most clearly above expectation: by ``(tokens - expected) / sqrt(expected)``."""
    rows, columns = np.triu_indices(len(layer.together), 1)
    meets, by_chance = layer.together[rows, columns], layer.expected[rows, columns]
    surprise = (meets - by_chance) / np.sqrt(np.maximum(by_chance, 1.0))
    order = np.argsort(-surprise, kind="stable")[:count]
    return [Pair(int(rows[i]), int(columns[i]), float(meets[i]), float(by_chance[i])) for i in order if surprise[i] > 0]


def lift_codes(layer: Meetings, shown: NDArray[np.integer]) -> NDArray[np.uint8]:
    """How often pairs meet relative to expectation, in one byte per pair.

    Args:
        layer: how often its experts meet.
        shown: ids of the experts that are shown, in their order.

    Returns:
        uint8 [n (n - 1) / 2], the part above the diagonal row by row. ``CHANCE + s`` stands for ``2 ** (s / 20)`` times
        as often as expected (to 2 %, at most ``2 ** 6.3`` times); see :data:`NEVER` and :data:`TOO_FEW`.
    """
    rows, columns = np.triu_indices(len(shown), 1)
    pair = shown[rows], shown[columns]
    meets, by_chance = layer.together[pair], layer.expected[pair]
    codes = np.full(len(rows), TOO_FEW, dtype=np.uint8)
    known = (by_chance >= ENOUGH) | (meets >= ENOUGH)
    codes[known & (meets <= 0)] = NEVER
    ratio = known & (meets > 0)
    steps = np.rint(np.log2(meets[ratio] / by_chance[ratio]) / _STEP)
    codes[ratio] = CHANCE + np.clip(steps, -_LIMIT, _LIMIT)
    return codes


def neighbours(layer: Meetings, ids: NDArray[np.integer]) -> NDArray[np.integer]:
    """An order of experts that puts those beside each other which often meet.

    Groups grow by average linkage: the two with the strongest mean tie join, turned so that their closest ends touch.
    Larger groups come first; experts that meet nobody more often than expected are groups of one.
    """
    expected = layer.expected[np.ix_(ids, ids)]
    tie = np.maximum(layer.together[np.ix_(ids, ids)] - expected, 0) / np.sqrt(np.maximum(expected, 1.0))
    np.fill_diagonal(tie, 0)
    near, groups = tie.copy(), {place: [place] for place in range(len(ids))}
    while groups:
        first, second = divmod(int(near.argmax()), len(ids))
        if near[first, second] <= 0:
            break
        sizes = len(groups[first]), len(groups[second])
        mean = (sizes[0] * near[first] + sizes[1] * near[second]) / sum(sizes)
        groups[first] = _joined(groups[first], groups.pop(second), tie)
        near[first], near[:, first] = mean, mean
        near[second], near[:, second], near[first, first] = 0, 0, 0
    ordered = sorted(groups.values(), key=len, reverse=True)
    return ids[[place for group in ordered for place in group]]


def _joined(first: list[int], second: list[int], tie: NDArray[np.float64]) -> list[int]:
    """Two groups in a row, each turned so that the ends that touch have the strongest tie."""
    turned = [(a, b) for a in (first, first[::-1]) for b in (second, second[::-1])]
    head, tail = max(turned, key=lambda pair: tie[pair[0][-1], pair[1][0]])
    return head + tail


def experts_lost(table: CoalitionTable, kept: NDArray[np.bool_], weights: TokenWeights | None) -> NDArray[np.float64]:
    """How the tokens of a layer divide by the number of their experts that are dropped.

    Args:
        table: the layer's coalitions.
        kept: bool [E].
        weights: how much tokens count.

    Returns:
        float64 [k + 1]: share of tokens that lose 0, 1, ... k of their experts; all 0 without tokens.
    """
    counts = table.weighted(weights).astype(np.float64)
    lost = (~kept[table.members]).sum(axis=1)
    tokens = np.bincount(lost, weights=counts, minlength=table.members.shape[1] + 1)
    whole = float(tokens.sum())
    return np.asarray(tokens / whole if whole > 0 else np.zeros(tokens.shape))


def lost_shares(trace: Trace, selection: Selection, weights: TokenWeights | None) -> NDArray[np.float64]:
    """:func:`experts_lost` of every layer of a trace, float64 [L, k + 1]."""
    mask = dict(zip(selection.layers, selection.mask(), strict=True))
    return np.stack([experts_lost(trace.coalitions[layer], mask[layer], weights) for layer in trace.info.layers])
