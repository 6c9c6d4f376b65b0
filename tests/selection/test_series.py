"""Series of selections: each inside the next larger one, and every budget exact, under every rule and constraint."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shape_moe.errors import BudgetError, UsageError
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.selection.budget import Constraints, Room
from shape_moe.selection.layer_curves import LayerCurves, cheapest_counts
from shape_moe.selection.method import Method
from shape_moe.selection.rules import budget_for
from shape_moe.selection.select import SelectOptions, TraceSelector, check_series, select_from_trace
from support.data import synthetic_trace

LAYERS, EXPERTS = 4, 12
TRACE = synthetic_trace(layers=LAYERS, experts=EXPERTS, top_k=3, tokens=300)


def falling_curves(seed: int, method: Method) -> LayerCurves:
    """Curves of steps at random places: what is cheapest at one budget is not within what is at a larger one."""
    draw, counts = np.random.default_rng(seed), (1, 2, 4, 6, 8, 10)
    steps = draw.exponential(size=(LAYERS, len(counts), 1, 2)) ** 3
    weights = get_scorer(method.scorer).weights_for(TRACE, ScoreOptions().weights)
    return LayerCurves(
        TRACE.info.fingerprint,
        TRACE.info.model,
        method.scorer,
        {**weights.flags, "seed": 0},
        method.routing,
        EXPERTS,
        TRACE.info.layers,
        counts,
        ("",),
        [[50.0, 50.0]],
        np.cumsum(steps[:, ::-1], axis=1)[:, ::-1].tolist(),
    )


@st.composite
def series_requests(draw):
    rule = draw(st.sampled_from(["coverage", "uniform", "global", "measured"]))
    target = draw(st.sampled_from(["ragged", "ragged", "stock"]))
    routing = "reroute" if target == "stock" else draw(st.sampled_from(["drop", "reroute"]))
    method = Method(draw(st.sampled_from(["shape", "frequency"])), rule, routing, target)
    curves = falling_curves(draw(st.integers(0, 200)), method) if rule == "measured" else None
    skipped = draw(st.sets(st.integers(0, LAYERS - 1), max_size=1)) if target == "ragged" else set()
    protect = draw(
        st.dictionaries(
            st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), max_size=2).map(lambda s: tuple(sorted(s)))
        )
    )
    options = SelectOptions(
        1.0,
        method,
        skip_layers=tuple(skipped),
        protect=protect,
        multiple_of=draw(st.sampled_from([1, 1, 2])),
        allow_rounding=draw(st.booleans()) or target == "stock",
        curves=curves,
    )
    keeps = draw(st.lists(st.integers(20, 100), min_size=2, max_size=4, unique=True))
    return options, [keep / 100 for keep in keeps]


@given(series_requests())
@settings(max_examples=150, deadline=None)
def test_each_is_inside_the_larger_one_and_every_budget_is_exact(request) -> None:
    options, keeps = request
    try:
        found = TraceSelector(TRACE).series(options, keeps)
    except BudgetError:
        assume(False)
    assert [selection.keep_asked for selection in found] == sorted(keeps, reverse=True)
    for larger, smaller in pairwise(found):
        assert not (smaller.mask() & ~larger.mask()).any()
    room = Room(LAYERS, EXPERTS, options.constraints(TRACE.info.layers, TRACE.info.routing))
    for selection in found:
        budget = budget_for(selection.keep_asked, LAYERS * EXPERTS)
        assert selection.kept == room.feasible(budget)
        assert selection.kept == budget or options.allow_rounding
        for layer, ids in options.protect.items():
            assert set(ids) <= set(selection.layers[layer])
        assert all(len(selection.layers[layer]) == EXPERTS for layer in options.skip_layers)
    alone = select_from_trace(TRACE, SelectOptions(**{**vars(options), "keep": max(keeps)}))
    assert found[0] == alone
    if options.curves is None:
        assert found == [
            select_from_trace(TRACE, SelectOptions(**{**vars(options), "keep": keep}))
            for keep in sorted(keeps, reverse=True)
        ]


def test_curves_alone_would_not_nest() -> None:
    method = Method("frequency", "measured")
    leaving = [
        seed
        for seed in range(40)
        if any(
            (smaller.mask() & ~larger.mask()).any()
            for larger, smaller in pairwise(
                select_from_trace(TRACE, SelectOptions(keep, method, curves=falling_curves(seed, method)))
                for keep in (0.8, 0.6, 0.4)
            )
        )
    ]
    assert len(leaving) >= 5


@given(st.integers(0, 10_000), st.integers(3, 15))
@settings(max_examples=60, deadline=None)
def test_within_limits_a_budget_is_spent_in_the_cheapest_way(seed, budget) -> None:
    draw = np.random.default_rng(seed)
    costs = draw.exponential(size=(3, 7))
    most = draw.integers(1, 7, size=3).tolist()
    assume(sum(most) >= budget)
    counts = cheapest_counts(costs, budget, Room(3, 6, Constraints()), most)
    assert sum(counts) == budget
    assert all(1 <= count <= limit for count, limit in zip(counts, most, strict=True))
    ways = product(*(range(1, limit + 1) for limit in most))
    cheapest = min(costs[range(3), way].sum() for way in ways if sum(way) == budget)
    assert costs[range(3), counts].sum() == pytest.approx(cheapest, rel=1e-12)


def test_what_makes_no_series_is_refused() -> None:
    with pytest.raises(UsageError, match="two keep rates or more"):
        check_series(SelectOptions(0.5), [0.5])
    with pytest.raises(UsageError, match=r"keep rate 0\.5 is given twice"):
        check_series(SelectOptions(0.5), [0.5, 0.75, 0.5])
    with pytest.raises(UsageError, match="must be above 0 and at most 1, not 85"):
        check_series(SelectOptions(0.5), [85, 75])
    with pytest.raises(UsageError, match="--tolerance reproduces one"):
        check_series(SelectOptions(0.5, tolerance=0.1), [0.5, 0.75])
