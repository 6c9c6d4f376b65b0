"""Sets of experts as sortable keys: equal sets, and sets that agree but for one expert, found by sorting.

A set's key is its rank among all sets of its size (the combinatorial number system), which is free of collisions; where
ranks exceed 64 bits, it is the set's bytes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[Any]
"""int64 or float64: sums of whole numbers stay whole."""
_INT64_MAX = 2**63 - 1


def add_equal(members: NDArray[np.int64], counts: Counts, num_experts: int) -> tuple[NDArray[np.int64], Counts]:
    """Each set once, with the counts of equal ones added up.

    Args:
        members: int64 [C, k], ascending in every row.
        counts: int64 or float64 [C].
        num_experts: ``E``; ids are below it.
    """
    order, starts = _runs(
        _keys(np.ascontiguousarray(members.T), num_experts), _key_limit(num_experts, members.shape[1])
    )
    if len(starts) == len(members):
        return members, counts
    return members[order[starts]], _sum_runs(counts[order], starts)


def containing_rest(columns: NDArray[np.int64], counts: Counts, num_experts: int) -> Counts:
    r"""Counts of all sets that contain ``A \ {i}``, for every member ``i`` of every set ``A``.

    Args:
        columns: int64 [k, C], ascending in every column; each set once.
        counts: int64 or float64 [C].
        num_experts: ``E``; ids are below it.

    Returns:
        int64 or float64 [k * C], flat in the order of ``columns``.
    """
    order, starts = _runs(_keys_without_one(columns, num_experts), _key_limit(num_experts, len(columns) - 1))
    sums = _sum_runs(np.tile(counts, len(columns))[order], starts)
    rest = np.empty(len(order), dtype=counts.dtype)
    rest[order] = np.repeat(sums, np.diff(starts, append=len(order)))
    return rest


def _key_limit(num_experts: int, size: int) -> int | None:
    """How many keys there can be, None where they are compared as bytes."""
    limit = math.comb(num_experts, size)
    return limit if limit <= _INT64_MAX else None


@cache
def _rank_table(num_experts: int, size: int) -> NDArray[np.int64]:
    """``C(n, j)`` [size + 1, E] for ``j <= size`` and ``n < E``: terms of the combinatorial number system."""
    table = np.array([[min(math.comb(n, j), _INT64_MAX) for n in range(num_experts)] for j in range(size + 1)])
    table.flags.writeable = False
    return table


def _keys(columns: NDArray[np.int64], num_experts: int) -> NDArray[Any]:
    """A key of every set ``c_0 < c_1 < ...`` [size, C], free of collisions.

    It is the set's rank ``sum_j C(c_j, j + 1)`` among all sets of that size, or its bytes where ranks exceed 64 bits.
    """
    size = len(columns)
    if _key_limit(num_experts, size) is None:
        packed = np.ascontiguousarray(columns.T.astype(np.uint16))
        return packed.view(np.dtype((np.void, 2 * size))).ravel()
    table = _rank_table(num_experts, size)
    return np.asarray(sum(table[j + 1][column] for j, column in enumerate(columns)))


def _keys_without_one(columns: NDArray[np.int64], num_experts: int) -> NDArray[Any]:
    r"""A key of ``A \ {i}`` for every member, flat in the order of ``columns`` [k, C].

    Leaving member ``p`` out keeps the rank's terms before it and moves those behind it down by one place, so all k keys
    come from two running sums.
    """
    top_k = len(columns)
    if _key_limit(num_experts, top_k - 1) is None:
        return np.concatenate([_keys(np.delete(columns, p, axis=0), num_experts) for p in range(top_k)])
    table = _rank_table(num_experts, top_k)
    keys = np.empty(columns.shape, dtype=np.int64)
    before = np.zeros(columns.shape[1], dtype=np.int64)
    for place in range(top_k):
        keys[place] = before
        if place < top_k - 1:
            before += table[place + 1][columns[place]]
    behind = np.zeros_like(before)
    for place in range(top_k - 1, 0, -1):
        behind += table[place][columns[place]]
        keys[place - 1] += behind
    return keys.ravel()


def _runs(keys: NDArray[Any], limit: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An order that brings equal keys together, and where in it each run of equal keys begins.

    Where key and position fit into 64 bits, they are sorted as one number, which is faster than sorting positions.
    """
    place_bits = len(keys).bit_length()
    if limit is not None and limit.bit_length() + place_bits <= 63:
        ordered = np.sort(keys << place_bits | np.arange(len(keys)))
        order = ordered & ((1 << place_bits) - 1)
        ordered >>= place_bits
    elif limit is not None:
        order = np.argsort(keys)
        ordered = keys[order]
    else:
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(group, kind="stable")
        return order, np.searchsorted(group[order], np.arange(len(first)))
    return order, np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _sum_runs(ordered: Counts, starts: NDArray[np.int64]) -> Counts:
    """Sum every run; exact for whole numbers, in ascending order for others."""
    if ordered.dtype != np.int64:
        run = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(ordered)))
        ordered = ordered[np.lexsort((ordered, run))]
    return np.add.reduceat(ordered, starts)
