"""The SHAPE value: experts as players of the empirical coalition game of a layer.

Source: arXiv 2606.09886, "Coalition-Aware Expert Pruning for Sparse Mixture-of-Experts LLMs".
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shape_moe.errors import UsageError
from shape_moe.scoring.coalition_keys import Counts, add_equal, containing_rest
from shape_moe.scoring.registry import ScoreOptions, register
from shape_moe.tracing.trace import Trace

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
    sets, v, unit = _checked(coalitions, counts, num_experts)
    if len(sets) == 0:
        return np.zeros(num_experts)
    k = sets.shape[1]
    columns = np.ascontiguousarray(sets.T)
    i = columns.ravel()  # every pair of a coalition A and a member i: [k * C], as v(A) and N(A \ {i}) below
    N = containing_rest(columns, v, num_experts)  # noqa: N806  # the formula's name
    v = np.tile(v, k)
    alpha_at = _smallest(i, v / N, num_experts)
    sums = _sum_by(i, v, num_experts), _sum_by(i, N, num_experts)
    difference = _difference(*sums, _at(alpha_at, v), _at(alpha_at, N))
    factor = 1.0 / (unit * k * math.comb(num_experts, k))  # (k-1)! (E-k)! / E! is 1 / (k C(E, k))
    return np.asarray(factor * difference)


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
    return *add_equal(members, totals, num_experts), unit


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


def _sum_by(index: NDArray[np.int64], values: Counts, size: int) -> Counts:
    """Sum by index; exact for whole numbers (whose float64 sums stay below 2^53), in ascending order for others."""
    if values.dtype == np.int64:
        return np.rint(np.bincount(index, weights=values, minlength=size)).astype(np.int64)
    order = np.argsort(values, kind="stable")
    return np.bincount(index[order], weights=values[order], minlength=size)


def _smallest(index: NDArray[np.int64], values: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Position of each index's smallest value, -1 where an index does not occur."""
    smallest = np.full(size, np.inf)
    np.minimum.at(smallest, index, values)
    where = np.full(size, -1, dtype=np.int64)
    hits = np.flatnonzero(values == smallest[index])
    where[index[hits]] = hits
    return where


def _at(position: NDArray[np.int64], values: Counts) -> Counts:
    """Values at positions; 1 where a position is -1."""
    return np.where(position >= 0, values[position], 1)


def _difference(v_sum: Counts, N_sum: Counts, v_least: Counts, N_least: Counts) -> NDArray[np.float64]:  # noqa: N803
    r"""``sum v(A) - alpha_i sum N(A \ {i})`` per expert, with ``alpha_i = v_least / N_least``.

    Whole numbers are subtracted exactly, as Python's integers; what is rounding among others counts as zero.
    """
    if v_sum.dtype == np.int64:
        rows = zip(v_sum.tolist(), N_sum.tolist(), v_least.tolist(), N_least.tolist(), strict=True)
        return np.array([(v * below - above * n) / below for v, n, above, below in rows])
    value = v_sum - v_least / N_least * N_sum
    return np.where(value > _ROUNDING * v_sum, value, 0.0)


@register("shape", needs=("coalitions",), least_top_k=2)
def shape(trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    """SHAPE value: coalitions in which no other expert takes the expert's place (arXiv 2606.09886).

    See :func:`shape_values` for the formula.

    Args:
        trace: any trace; only its coalitions are used.
        options: how much tokens count.

    Returns:
        float64 [L, E].

    Raises:
        UsageError: for a model with top-1 routing.
    """
    rows = []
    for layer in trace.info.layers:
        table = trace.coalitions[layer]
        counts = table.weighted(options.weights)
        rows.append(shape_values(table.members, counts, trace.info.num_experts))
    return np.stack(rows)
