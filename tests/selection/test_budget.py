"""The budget function: exact to the expert under every combination of constraints."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shape_moe.errors import BudgetError, UsageError
from shape_moe.selection.budget import Constraints, choose
from shape_moe.selection.rules import coverage_priority, global_priority, layer_ranks

LAYERS, EXPERTS = 5, 12


def priorities(seed: int) -> np.ndarray:
    return coverage_priority(np.random.default_rng(seed).exponential(size=(LAYERS, EXPERTS)))


@given(st.integers(0, 10_000), st.integers(LAYERS, LAYERS * EXPERTS))
@settings(max_examples=100, deadline=None)
def test_without_constraints_the_smallest_priorities_are_kept(seed, budget) -> None:
    priority = priorities(seed)
    kept = choose(priority, budget, Constraints(floor=0))
    assert kept.sum() == budget
    if budget < priority.size:
        assert priority[kept].max() <= priority[~kept].min()


@st.composite
def constraint_sets(draw):
    rows = st.integers(0, LAYERS - 1)
    protect = draw(
        st.dictionaries(rows, st.sets(st.integers(0, EXPERTS - 1), max_size=3).map(lambda s: tuple(sorted(s))))
    )
    return Constraints(
        skip_layers=frozenset(draw(st.sets(rows, max_size=2))),
        protect=protect,
        floor=draw(st.integers(1, 4)),
        multiple_of=draw(st.sampled_from([1, 1, 2, 3, 4])),
        groups=draw(st.sampled_from([1, 1, 2, 4])),
    )


@given(st.integers(0, 10_000), st.integers(1, LAYERS * EXPERTS), constraint_sets())
@settings(max_examples=300, deadline=None)
def test_every_constraint_holds_and_the_budget_is_exact(seed, budget, constraints) -> None:
    priority = priorities(seed)
    try:
        kept = choose(priority, budget, constraints)
    except BudgetError as error:
        for near in (error.below, error.above):
            if near is not None:
                assert choose(priority, near, constraints).sum() == near
                assert near != budget
        return
    except UsageError:
        assume(False)
    assert kept.sum() == budget
    size = EXPERTS // constraints.groups
    for row in range(LAYERS):
        if row in constraints.skip_layers:
            assert kept[row].all()
            continue
        assert kept[row, list(constraints.protect.get(row, ()))].all()
        assert kept[row].sum() >= constraints.floor
        assert kept[row].sum() % constraints.multiple_of == 0
        assert len({int(part.sum()) for part in kept[row].reshape(-1, size)}) == 1


@given(st.integers(0, 10_000), st.integers(1, LAYERS * EXPERTS), constraint_sets())
@settings(max_examples=100, deadline=None)
def test_nearest_budgets_leave_no_gap(seed, budget, constraints) -> None:
    priority = priorities(seed)
    feasible = []
    for candidate in range(1, LAYERS * EXPERTS + 1):
        try:
            choose(priority, candidate, constraints)
            feasible.append(candidate)
        except BudgetError:
            pass
        except UsageError:
            assume(False)
    try:
        choose(priority, budget, constraints)
    except BudgetError as error:
        assert error.below == max((n for n in feasible if n < budget), default=None)
        assert error.above == min((n for n in feasible if n > budget), default=None)


def test_floor_keeps_the_best_ranked() -> None:
    priority = global_priority(np.array([[9.0, 8.0, 7.0, 6.0], [0.1, 0.4, 0.3, 0.2]]))
    kept = choose(priority, 4, Constraints(floor=2))
    assert kept.tolist() == [[True, True, False, False], [False, True, True, False]]


def test_protected_experts_replace_others() -> None:
    priority = global_priority(np.array([[4.0, 3.0, 2.0, 1.0]]))
    kept = choose(priority, 2, Constraints(protect={0: (3,)}))
    assert kept.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize(("budget", "counts"), [(2, [2, 0]), (4, [2, 2]), (6, [2, 4])])
def test_chunks_enter_by_their_first_member(budget, counts) -> None:
    # pairs by rank: layer 0 (10, 1), (0.9, 0.8); layer 1 (5, 4), (3, 2). First members: 10, 5, 3; last ones: 4, 2, 1
    priority = global_priority(np.array([[10.0, 1.0, 0.9, 0.8], [5.0, 4.0, 3.0, 2.0]]))
    kept = choose(priority, budget, Constraints(floor=0, multiple_of=2))
    assert kept.sum(axis=1).tolist() == counts
    assert all(row[:count].all() for row, count in zip(kept, counts, strict=True))


@pytest.mark.parametrize("budget", [2, 4])
def test_a_chunk_of_router_groups_enters_by_its_best_member(budget) -> None:
    # one of each group at a time: layer 0 offers (9, 1), layer 1 (8, 7); then (3, 0.5) and (6, 5)
    values = np.array([[9.0, 3, 2, 0, 1, 0.5, 0, 0], [8.0, 6, 0, 0, 7, 5, 0, 0]])
    found = choose(global_priority(values), budget, Constraints(floor=0, groups=2))
    assert np.flatnonzero(found[0]).tolist() == [0, 4]
    assert np.flatnonzero(found[1]).tolist() == ([] if budget == 2 else [0, 4])


@given(st.integers(0, 10_000), st.integers(0, 24), st.sampled_from([1, 2, 3]))
@settings(max_examples=100, deadline=None)
def test_chunks_are_those_that_a_search_over_all_finds(seed, chunks, size) -> None:
    """The smallest first members, found by hand from sorted layers."""
    values = np.random.default_rng(seed).permutation(24).reshape(2, 12).astype(float)
    assume(chunks <= 24 // size)
    kept = choose(global_priority(values), chunks * size, Constraints(floor=0, multiple_of=size))
    ranked = -np.sort(-values, axis=1)
    heads = sorted(((-row[start], layer) for layer, row in enumerate(ranked) for start in range(0, 12, size)))
    wanted = [sum(layer == row for _, layer in heads[:chunks]) * size for row in range(2)]
    assert kept.sum(axis=1).tolist() == wanted
    for row, count in enumerate(wanted):
        assert sorted(values[row][kept[row]]) == sorted(ranked[row, :count])


def test_ties_go_to_the_better_rank_then_to_the_earlier_layer() -> None:
    ranks = np.array([[3, 2, 1, 0], [0, 1, 2, 3]])
    kept = choose(np.zeros((2, 4)), 3, Constraints(floor=0), ranks=ranks)
    assert kept.tolist() == [[False, True, True, True], [False] * 4]
    by_id = choose(np.zeros((2, 4)), 5, Constraints(floor=0))
    assert by_id.tolist() == [[True] * 4, [True, False, False, False]]


def test_a_smaller_priority_goes_before_a_better_rank() -> None:
    """Ranks decide between equal priorities alone, whatever order they would give."""
    priority = np.array([[0.4, 0.3, 0.2, 0.1]])
    kept = choose(priority, 2, Constraints(floor=0), ranks=np.array([[0, 1, 2, 3]]))
    assert kept.tolist() == [[False, False, True, True]]


def test_groups_keep_equal_counts() -> None:
    priority = global_priority(np.array([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]))
    kept = choose(priority, 4, Constraints(groups=2))
    assert kept[0].tolist() == [True, True, False, False, True, True, False, False]


def test_equal_counts_ignore_layers_of_high_value() -> None:
    values = np.random.default_rng(0).uniform(size=(4, 8))
    values[0] *= 100
    kept = choose(global_priority(values), 12, Constraints(equal=True))
    assert kept.sum(axis=1).tolist() == [3, 3, 3, 3]
    best = layer_ranks(values) < 3
    assert (kept == best).all()


def test_ties_between_layers_go_to_the_earlier_one() -> None:
    kept = choose(np.zeros((3, 4)), 5, Constraints(floor=1))
    assert kept.sum(axis=1).tolist() == [3, 1, 1]
    assert kept[0].tolist() == [True, True, True, False]


def test_infeasible_budgets_name_the_constraint_and_the_nearest() -> None:
    priority = priorities(0)
    with pytest.raises(BudgetError, match=r"equal counts.*30 \(0.5000\) and 35 \(0.5833\)") as caught:
        choose(priority, 32, Constraints(equal=True))
    assert (caught.value.below, caught.value.above) == (30, 35)
    with pytest.raises(BudgetError, match="floor of 4") as caught:
        choose(priority, 7, Constraints(floor=4))
    assert (caught.value.below, caught.value.above) == (None, 20)
    with pytest.raises(BudgetError, match="multiples of 5"):
        choose(priority, 60, Constraints(multiple_of=5))


def test_rounding_takes_the_budget_below() -> None:
    assert choose(priorities(0), 32, Constraints(equal=True, allow_rounding=True)).sum() == 30
    with pytest.raises(BudgetError):
        choose(priorities(0), 3, Constraints(floor=4, allow_rounding=True))


@pytest.mark.parametrize(
    ("constraints", "word"),
    [
        (Constraints(multiple_of=0), "multiple_of"),
        (Constraints(groups=5), "groups"),
        (Constraints(skip_layers=frozenset({9})), "must be among"),
        (Constraints(protect={0: (12,)}), "different ids"),
        (Constraints(protect={0: (1, 1)}), "different ids"),
        (Constraints(equal=True, skip_layers=frozenset({0})), "exclude each other"),
        (Constraints(floor=11, multiple_of=8), "floor of 11"),
    ],
)
def test_contradictions_are_refused(constraints, word) -> None:
    with pytest.raises(UsageError, match=word):
        choose(priorities(0), 30, constraints)
