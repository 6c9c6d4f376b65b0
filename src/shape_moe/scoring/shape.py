"""The SHAPE value: experts as players of the empirical coalition game of a layer.

Source: arXiv 2606.09886, "Coalition-Aware Expert Pruning for Sparse Mixture-of-Experts LLMs".
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.errors import UsageError
from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace

Counts = NDArray[Any]
"""int64 or float64: sums of whole numbers stay whole."""
_INT64_MAX = 2**63 - 1
_LARGEST_UNIT = 1000
"""Weighted counts are computed in whole units of a token divided by something up to this, where they are such."""
_ROUNDING = 1e-12
"""Values of weighted (float) counts below this share of an expert's tokens are rounding, and count as zero."""


def shape_values(coalitions: NDArray[np.integer], counts: Counts, num_experts: int) -> NDArray[np.float64]:
    r"""SHAPE values of one layer's experts.

    With ``v(A)`` the tokens whose coalition is ``A`` and ``N(S)`` the tokens whose coalition contains ``S``::

        alpha_i = min over A containing i of  v(A) / N(A \ {i})
        phi_i   = (k-1)! (E-k)! / E!  *  sum over A containing i of  [ v(A) - alpha_i N(A \ {i}) ]

    over the observed coalitions ``A``. Experts that were never routed to get 0; no value is negative. The sums are
    exact for counts that are whole multiples of a token's ``1/n`` (``n`` up to 1000); whatever the counts are, the
    result does not depend on the order of rows or on the names of experts.

    Args:
        coalitions: int [C, k], the experts of each coalition, in any order; equal rows add.
        counts: int or float [C], tokens per coalition, not negative.
        num_experts: ``E``.

    Returns:
        float64 [E], in units of tokens times ``(k-1)!(E-k)!/E!``.

    Raises:
        UsageError: for ``k = 1``, where every value would be 0, and for malformed tables.
    """
    members, totals, unit = _checked(coalitions, counts, num_experts)
    top_k = members.shape[1]
    if len(members) == 0:
        return np.zeros(num_experts)
    rest = _containing(members, totals, num_experts)
    flat = members.ravel()
    worth = np.repeat(totals, top_k)
    share = worth / rest
    alpha_at = _first_minimum(flat, share, num_experts)
    sums = _sum_by(flat, worth, num_experts), _sum_by(flat, rest, num_experts)
    factor = 1.0 / (unit * top_k * math.comb(num_experts, top_k))
    return np.asarray(factor * _remainder(sums, worth, rest, alpha_at))


def _checked(
    coalitions: NDArray[np.integer], counts: Counts, num_experts: int
) -> tuple[NDArray[np.int64], Counts, int]:
    """Rows sorted and each once, without coalitions of weight zero; counts int64 or float64, times a unit."""
    members = np.sort(np.asarray(coalitions, dtype=np.int64), axis=1)
    counts = np.asarray(counts)
    totals = counts.astype(np.float64 if np.issubdtype(counts.dtype, np.floating) else np.int64)
    if members.ndim != 2 or totals.shape != members.shape[:1]:
        raise UsageError("Coalitions must be a table [C, k] with one count per row.")
    if members.shape[1] == 1:
        raise UsageError("SHAPE needs coalitions of at least two experts; with top-1 routing every value would be 0.")
    if len(members) and (members.min() < 0 or members.max() >= num_experts or (np.diff(members) <= 0).any()):
        raise UsageError(f"Every coalition must hold different experts between 0 and {num_experts - 1}.")
    if not (np.isfinite(totals).all() and (totals >= 0).all()):
        raise UsageError("Counts of coalitions must be finite and not negative.")
    observed = totals > 0
    members, totals = members[observed], totals[observed]
    if len(members) == 0:
        return members, totals, 1
    totals, unit = _in_whole_units(totals)
    group, first = _group_ids(members, num_experts)
    return members[first], _sum_by(group, totals, len(first)), unit


def _in_whole_units(totals: Counts) -> tuple[Counts, int]:
    """Counts times the smallest unit that makes them whole numbers, and that unit; as they are if none does."""
    if totals.dtype == np.int64:
        return totals, 1
    different = np.unique(totals)
    for unit in range(1, _LARGEST_UNIT + 1):
        scaled = different * unit
        if (np.abs(scaled - np.rint(scaled)) <= _ROUNDING * scaled).all():
            return np.rint(totals * unit).astype(np.int64), unit
    return totals, 1


def _containing(members: NDArray[np.int64], totals: Counts, num_experts: int) -> Counts:
    r"""``N(A \ {i})`` for every (coalition, member), flat in row order."""
    top_k = members.shape[1]
    if math.comb(num_experts, top_k - 1) <= _INT64_MAX:
        keys = _keys_without_one(members, num_experts).ravel()
        group, first = _group_sorted(keys)
    else:
        rows = np.stack([np.delete(members, i, axis=1) for i in range(top_k)], axis=1)
        group, first = _group_ids(rows.reshape(-1, top_k - 1), num_experts)
    sums = _sum_by(group, np.repeat(totals, top_k), len(first))
    return sums[group]


def _rank_table(num_experts: int, size: int) -> NDArray[np.int64]:
    """``C(n, j)`` for ``n < E`` and ``j <= size``: terms of the combinatorial number system."""
    table = np.zeros((num_experts, size + 1), dtype=np.int64)
    for j in range(size + 1):
        table[:, j] = [min(math.comb(n, j), _INT64_MAX) for n in range(num_experts)]
    return table


def _keys_without_one(members: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    r"""A key of ``A \ {i}`` for every member, [C, k]: its rank among all sets of that size, hence free of collisions.

    A set ``c_0 < c_1 < ...`` has rank ``sum_j C(c_j, j + 1)``. Leaving member ``p`` out keeps the terms before it and
    moves those behind it down by one place, so all k keys come from two running sums.
    """
    top_k = members.shape[1]
    table = _rank_table(num_experts, top_k)
    place = np.arange(top_k)
    kept = table[members, place + 1]
    moved = table[members, place]
    before = np.cumsum(kept, axis=1) - kept
    behind = moved.sum(axis=1, keepdims=True) - np.cumsum(moved, axis=1)
    return np.asarray(before + behind)


def _group_ids(rows: NDArray[np.int64], num_experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number equal rows alike: group of every row, and the first row of every group."""
    size = rows.shape[1]
    if math.comb(num_experts, size) <= _INT64_MAX:
        return _group_sorted(_rank_table(num_experts, size)[rows, np.arange(1, size + 1)].sum(axis=1))
    packed = np.ascontiguousarray(rows.astype(np.uint16)).view(np.dtype((np.void, 2 * size))).ravel()
    _, first, group = np.unique(packed, return_index=True, return_inverse=True)
    return group, first


def _group_sorted(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(keys)
    ordered = keys[order]
    starts = np.empty(len(keys), dtype=bool)
    starts[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=starts[1:])
    group = np.empty(len(keys), dtype=np.int64)
    group[order] = np.cumsum(starts) - 1
    return group, order[starts]


def _sum_by(index: NDArray[np.int64], values: Counts, size: int) -> Counts:
    """Sum by index; exact for whole numbers (whose float64 sums stay below 2^53), in ascending order for others."""
    if values.dtype == np.int64:
        return np.rint(np.bincount(index, weights=values, minlength=size)).astype(np.int64)
    order = np.argsort(values, kind="stable")
    return np.bincount(index[order], weights=values[order], minlength=size)


def _first_minimum(index: NDArray[np.int64], values: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Position of each index's smallest value, -1 where an index does not occur."""
    smallest = np.full(size, np.inf)
    np.minimum.at(smallest, index, values)
    where = np.full(size, -1, dtype=np.int64)
    hits = np.flatnonzero(values == smallest[index])
    where[index[hits]] = hits
    return where


def _remainder(
    sums: tuple[Counts, Counts],
    worth: Counts,
    rest: Counts,
    alpha_at: NDArray[np.int64],
) -> NDArray[np.float64]:
    r"""``sum v(A) - alpha_i sum N(A\i)`` per expert, with ``alpha_i = worth / rest`` at ``alpha_at``."""
    result = np.zeros(len(alpha_at))
    whole = worth.dtype == np.int64
    for expert in np.flatnonzero(alpha_at >= 0):
        total, contained = sums[0][expert].item(), sums[1][expert].item()
        top, bottom = worth[alpha_at[expert]].item(), rest[alpha_at[expert]].item()
        if whole:
            result[expert] = (total * bottom - top * contained) / bottom
        else:
            value = total - top / bottom * contained
            result[expert] = value if value > _ROUNDING * total else 0.0
    return result


@register("shape", needs=("coalitions",))
def shape(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """SHAPE value: coalitions in which no other expert takes the expert's place (arXiv 2606.09886).

    See :func:`shape_values` for the formula.

    Args:
        trace: any trace; only its coalitions are used.
        options: factors on the counts of prompt and response tokens.

    Returns:
        float64 [L, E].

    Raises:
        UsageError: for a model with top-1 routing.
    """
    weights, rows = options.weights, []
    for layer in trace.info.layers:
        table = trace.coalitions[layer]
        counts = table.weighted(weights.prompt, weights.response)
        rows.append(shape_values(table.members, counts, trace.info.num_experts))
    return np.stack(rows)
