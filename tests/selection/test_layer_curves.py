"""Layer curves, and the counts that a budget gets from them: the least total of all ways to spend it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shape_moe
from shape_moe.errors import BudgetError, CheckpointError, FingerprintError, UsageError
from shape_moe.selection.budget import Constraints, Room
from shape_moe.selection.layer_curves import (
    LayerCurves,
    cheapest_counts,
    choose_by_curves,
    counts_to_measure,
    load_curves,
)
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_scores, select_from_trace
from shape_moe.tracing.trace import Trace
from support.data import synthetic_trace


@st.composite
def problems(draw):
    """Costs, constraints and a budget that can be met."""
    layers, experts = draw(st.integers(1, 3)), draw(st.sampled_from([4, 6, 8]))
    whole = st.integers(0, 20).map(float)
    costs = np.array(
        draw(st.lists(st.lists(whole, min_size=experts + 1, max_size=experts + 1), min_size=layers, max_size=layers))
    )
    groups = draw(st.sampled_from([1, 2]))
    rules = Constraints(
        skip_layers=frozenset(draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))),
        floor=draw(st.integers(1, 3)),
        multiple_of=draw(st.sampled_from([1, 2])),
        groups=groups,
    )
    room = Room(layers, experts, rules)
    ways = list(itertools.product(*(_allowed(room, row) for row in range(layers))))
    budget = draw(st.sampled_from(sorted({sum(way) for way in ways})))
    return costs, budget, room, ways


def _allowed(room: Room, row: int) -> list[int]:
    """Every number of experts that a layer may keep."""
    groups = room.rules.groups
    if row in room.rules.skip_layers:
        return [room.experts]
    return [count * groups for count in range(room.base[row], room.most + 1, room.step)]


@given(problems())
def test_counts_are_the_cheapest_of_all_ways(problem) -> None:
    costs, budget, room, ways = problem
    counts = [count * room.rules.groups for count in cheapest_counts(costs, budget, room)]
    rows = np.arange(room.layers)
    cheapest = min(costs[rows, list(way)].sum() for way in ways if sum(way) == budget)
    assert sum(counts) == budget
    assert tuple(counts) in ways
    assert costs[rows, counts].sum() == cheapest


@given(problems(), st.randoms(use_true_random=False))
def test_layers_keep_their_best_and_what_is_protected(problem, random) -> None:
    costs, _, room, _ = problem
    layers, experts = costs.shape[0], costs.shape[1] - 1
    protect = {row: (random.randrange(experts),) for row in range(layers)}
    guarded = Room(layers, experts, replace(room.rules, protect=protect))
    ranks = np.array([random.sample(range(experts), experts) for _ in range(layers)])
    budget = (
        sum(guarded.base) + (sum(guarded.most - guarded.base[row] for row in guarded.open_rows))
    ) * room.rules.groups
    kept = choose_by_curves(costs, budget, guarded, ranks)
    assert kept.sum() == budget
    assert all(kept[row, ids[0]] for row, ids in protect.items())
    size = experts // room.rules.groups
    for row in range(layers):
        for group in range(room.rules.groups):
            members = [e for e in range(group * size, (group + 1) * size) if e not in protect[row]]
            inside = [ranks[row, e] for e in members if kept[row, e]]
            outside = [ranks[row, e] for e in members if not kept[row, e]]
            assert not inside or not outside or max(inside) < min(outside)


def test_equal_counts_leave_nothing_to_share_out() -> None:
    costs = np.zeros((2, 9))
    costs[0, :8] = 100
    kept = choose_by_curves(costs, 8, Room(2, 8, Constraints(equal=True)), np.tile(np.arange(8), (2, 1)))
    assert kept.sum(axis=1).tolist() == [4, 4]


def test_an_infeasible_budget_is_refused() -> None:
    with pytest.raises(BudgetError):
        choose_by_curves(np.zeros((2, 9)), 7, Room(2, 8, Constraints(multiple_of=2)), np.tile(np.arange(8), (2, 1)))


def curves_of(trace: Trace, sums: np.ndarray, counts: tuple[int, ...], **changes) -> LayerCurves:
    """Curves for a trace, from sums [L, N, C, 2]."""
    entries = {
        "fingerprint": trace.info.fingerprint,
        "model": "tiny",
        "scorer": "replacement",
        "options": {"predicting": 1.0, "other": 0.25, "seed": 0},
        "routing": "drop",
        "num_experts": trace.info.num_experts,
        "layers": trace.info.layers,
        "counts": counts,
        "classes": trace.info.classes,
        "tokens": [[10.0, 10.0]] * len(trace.info.classes),
        "sums": sums.tolist(),
    }
    return LayerCurves(**{**entries, **changes})


def test_curves_rise_from_the_whole_layer_and_are_linear_between_counts() -> None:
    trace = synthetic_trace(layers=1, experts=8, top_k=2)
    sums = np.array([40.0, 10.0, 20.0])[None, :, None, None] * np.ones((1, 3, 1, 2))
    curves = curves_of(trace, sums, (1, 2, 5))
    expected = [np.inf, 4.0, 2.0, 2.0, 2.0, 2.0, 2 * 2 / 3, 2 / 3, 0.0]  # 10 at n = 2 is noise: 20 at n = 5 is more
    np.testing.assert_allclose(curves.costs()[0], expected, rtol=1e-12)


def test_a_layer_costs_what_it_costs_the_class_that_needs_it_most() -> None:
    trace = synthetic_trace(layers=1, experts=4, top_k=2, classes=("a", "b"))
    sums = np.array([[[[30.0, 30.0], [10.0, 10.0]], [[1.0, 1.0], [8.0, 8.0]]]])  # layer, count, class, half
    curves = curves_of(trace, sums, (1, 2), tokens=[[10.0, 10.0], [5.0, 5.0]])
    np.testing.assert_allclose(curves.costs()[0, 1:], [3.0, 1.6, 0.8, 0.0])
    assert curves.predicted([2]) == pytest.approx({"a": 0.1, "b": 1.6})


def test_each_half_has_its_own_curve() -> None:
    trace = synthetic_trace(layers=1, experts=4, top_k=2)
    curves = curves_of(trace, np.array([[[[30.0, 10.0]]]]), (2,))
    assert [curves.costs(half)[0, 2] for half in (0, 1)] == [3.0, 1.0]
    assert curves.costs()[0, 2] == 2.0


def test_less_than_a_token_counts_and_none_costs_nothing() -> None:
    trace = synthetic_trace(layers=1, experts=4, top_k=2, classes=("a", "b"))
    sums = np.array([[[[3.0, 1.0], [5.0, 5.0]]]])
    curves = curves_of(trace, sums, (2,), tokens=[[0.25, 0.25], [0.0, 0.0]])
    assert curves.by_class()[:, 0, 2].tolist() == [8.0, 0.0]
    assert [curves.by_class(half)[0, 0, 2] for half in (0, 1)] == [12.0, 4.0]


@pytest.mark.parametrize(("experts", "floor", "groups"), [(32, 1, 1), (32, 4, 1), (8, 2, 1), (128, 8, 1), (64, 12, 4)])
def test_the_grid_begins_at_the_floor_and_ends_below_the_whole_layer(experts, floor, groups) -> None:
    counts = counts_to_measure(experts, floor, groups)
    assert counts[0] == -(-floor // groups) * groups
    assert counts[-1] < experts
    assert len(counts) <= 12
    assert all(count % groups == 0 for count in counts)


@pytest.mark.parametrize(
    ("experts", "floor", "groups", "counts"),
    [
        (128, 2, 1, (2, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 112)),
        (32, 1, 1, (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28)),
        (16, 3, 2, (4, 6, 8, 10, 12, 14)),
    ],
)
def test_the_grid_holds_parts_of_the_layer(experts, floor, groups, counts) -> None:
    assert counts_to_measure(experts, floor, groups) == counts


def test_a_selection_by_curves_is_as_cheap_as_can_be() -> None:
    trace = synthetic_trace(layers=3, experts=8, top_k=2)
    rng = np.random.default_rng(0)
    curves = curves_of(trace, rng.uniform(0, 50, (3, 4, 1, 2)), (1, 2, 4, 6))
    chosen = select_from_trace(trace, SelectOptions(0.5, Method("replacement", "measured"), curves=curves))
    counts = [len(ids) for ids in chosen.layers.values()]
    costs, rows = curves.costs(), np.arange(3)
    ways = [way for way in itertools.product(range(1, 9), repeat=3) if sum(way) == 12]
    assert costs[rows, counts].sum() == pytest.approx(min(costs[rows, list(way)].sum() for way in ways))
    assert chosen.alpha is None
    assert chosen.constraints["measured"]["predicted_kl"] == pytest.approx({"": costs[rows, counts].sum()})
    assert 0 < chosen.stability["agreement"] <= 1
    skipped = SelectOptions(
        0.6, Method("replacement", "measured"), curves=curves, skip_layers=(1,), multiple_of=2, allow_rounding=True
    )
    counts = [len(ids) for ids in select_from_trace(trace, skipped).layers.values()]
    assert counts[1] == 8
    assert all(count % 2 == 0 for count in counts)


def test_curves_must_be_those_of_the_trace_and_the_method() -> None:
    trace = synthetic_trace(layers=1, experts=8, top_k=2)
    curves = curves_of(trace, np.ones((1, 1, 1, 2)), (1,))
    method = Method("replacement", "measured")
    with pytest.raises(UsageError, match="needs layer curves: make them with `shape-moe measure`"):
        select_from_trace(trace, SelectOptions(0.5, method))
    for other in (replace(method, scorer="reap"), replace(method, routing="reroute")):
        with pytest.raises(UsageError, match="measured for scorer replacement, routing drop"):
            select_from_trace(trace, SelectOptions(0.5, other, curves=curves))
    foreign = replace(curves, fingerprint="sha256:" + "d" * 64)
    with pytest.raises(FingerprintError, match="of another model"):
        select_from_trace(trace, SelectOptions(0.5, method, curves=foreign))
    with pytest.raises(UsageError, match="belong to a trace"):
        select_from_scores(shape_moe.score(trace), SelectOptions(0.5, method, curves=curves))


def test_a_file_of_curves_comes_back_or_is_refused(tmp_path) -> None:
    trace = synthetic_trace(layers=2, experts=8, top_k=2)
    curves = curves_of(trace, np.random.default_rng(1).uniform(0, 5, (2, 2, 1, 2)), (1, 4))
    file = tmp_path / "curves.json"
    curves.save(file)
    assert load_curves(file) == curves
    document = json.loads(file.read_text())
    for broken in (
        {**document, "format_version": 9},
        {**document, "counts": [4, 1]},
        {**document, "counts": [1, 8]},
        {**document, "sums": document["sums"][:1]},
        {**document, "tokens": [[0.0, 0.0]]},
        {**document, "extra": 1},
    ):
        file.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="layer curves"):
            load_curves(file)
