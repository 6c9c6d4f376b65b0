"""The SHAPE value: experts as players of the empirical coalition game of a layer.

Source: arXiv 2606.09886, "Coalition-Aware Expert Pruning for Sparse Mixture-of-Experts LLMs".
"""

from __future__ import annotations

import math
from functools import cache
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
    columns = np.ascontiguousarray(members.T)
    top_k, width = columns.shape
    if width == 0:
        return np.zeros(num_experts)
    flat, worth = columns.ravel(), np.tile(totals, top_k)
    rest = _containing(columns, worth, num_experts)
    alpha_at = _first_minimum(flat, worth / rest, num_experts)
    sums = _sum_by(flat, worth, num_experts), _sum_by(flat, rest, num_experts)
    factor = 1.0 / (unit * top_k * math.comb(num_experts, top_k))
    return np.asarray(factor * _remainder(sums, worth, rest, alpha_at))


def _checked(
    coalitions: NDArray[np.integer], counts: Counts, num_experts: int
) -> tuple[NDArray[np.int64], Counts, int]:
    """Rows sorted and each once, without coalitions of weight zero; counts int64 or float64, times a unit."""
    members = np.asarray(coalitions, dtype=np.int64)
    counts = np.asarray(counts)
    totals = counts.astype(np.float64 if np.issubdtype(counts.dtype, np.floating) else np.int64)
    if members.ndim != 2 or totals.shape != members.shape[:1]:
        raise UsageError("Coalitions must be a table [C, k] with one count per row.")
    if members.shape[1] == 1:
        raise UsageError("SHAPE needs coalitions of at least two experts; with top-1 routing every value would be 0.")
    if (members[:, 1:] <= members[:, :-1]).any():
        members = np.sort(members, axis=1)
    outside = len(members) and (members[:, 0].min() < 0 or members[:, -1].max() >= num_experts)
    if outside or (members[:, 1:] <= members[:, :-1]).any():
        raise UsageError(f"Every coalition must hold different experts between 0 and {num_experts - 1}.")
    if not (np.isfinite(totals).all() and (totals >= 0).all()):
        raise UsageError("Counts of coalitions must be finite and not negative.")
    observed = totals > 0
    if not observed.all():
        members, totals = members[observed], totals[observed]
    if len(members) == 0:
        return members, totals, 1
    totals, unit = _in_whole_units(totals)
    keys = _keys(np.ascontiguousarray(members.T), num_experts)
    order, starts = _runs(keys, _key_limit(num_experts, members.shape[1]))
    if len(starts) == len(members):
        return members, totals, unit
    return members[order[starts]], _sum_runs(totals[order], starts), unit


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


def _containing(columns: NDArray[np.int64], worth: Counts, num_experts: int) -> Counts:
    r"""``N(A \ {i})`` for every (member, coalition), flat in the order of ``columns`` [k, C]."""
    order, starts = _runs(_keys_without_one(columns, num_experts), _key_limit(num_experts, len(columns) - 1))
    sums = _sum_runs(worth[order], starts)
    rest = np.empty_like(worth)
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


@register("shape", needs=("coalitions",), least_top_k=2)
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
