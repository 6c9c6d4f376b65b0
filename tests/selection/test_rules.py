"""Priorities: the coverage rule against its definition, ties, layers without mass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.errors import UsageError
from shape_moe.selection.rules import (
    bisection_budget,
    budget_for,
    coverage_priority,
    get_rule,
    global_priority,
    layer_ranks,
    uniform_priority,
)
from support import brute_force

VALUES = st.lists(st.lists(st.floats(0.001, 100), min_size=6, max_size=6, unique=True), min_size=1, max_size=5).map(
    np.array
)


@given(VALUES, st.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_alpha_above_tau_keeps_the_shortest_prefix(values, alpha) -> None:
    tau = coverage_priority(values)
    if np.abs(tau - alpha).min() < 1e-9:
        return  # at the boundary, rounding decides
    expected = brute_force.coverage_prefixes(values, alpha)
    assert [set(np.flatnonzero(row)) for row in alpha > tau] == expected


@given(VALUES, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_names_do_not_matter(values, random) -> None:
    order = random.sample(range(6), 6)
    for name in ("coverage", "uniform", "global"):
        rule = get_rule(name)
        np.testing.assert_allclose(rule(values[:, order], None), rule(values, None)[:, order], rtol=1e-12)


@given(VALUES, st.floats(0.5, 100))
@settings(max_examples=50, deadline=None)
def test_coverage_ignores_the_scale_of_a_layer(values, factor) -> None:
    scaled = values.copy()
    scaled[0] *= factor
    np.testing.assert_allclose(coverage_priority(scaled), coverage_priority(values), rtol=1e-9, atol=1e-12)


def test_experts_without_value_come_last() -> None:
    values = np.array([[3.0, 0.0, 1.0, -2.0]])
    np.testing.assert_allclose(coverage_priority(values), [[0.0, 1 + 2 / 4, 0.75, 1 + 3 / 4]])


def test_layer_without_mass() -> None:
    np.testing.assert_allclose(coverage_priority(np.zeros((1, 4))), [[0, 0.25, 0.5, 0.75]])
    np.testing.assert_allclose(coverage_priority(np.array([[-1.0, 0.0]])), [[0.5, 0.0]])


def test_ties_go_to_more_activations_then_lower_id() -> None:
    values = np.array([[1.0, 1.0, 1.0, 2.0]])
    assert layer_ranks(values, np.array([[5.0, 9.0, 5.0, 0.0]])).tolist() == [[2, 1, 3, 0]]
    assert layer_ranks(values).tolist() == [[1, 2, 3, 0]]


def test_uniform_and_global() -> None:
    values = np.array([[3.0, 1.0], [10.0, 20.0]])
    assert uniform_priority(values).tolist() == [[0.0, 0.5], [0.5, 0.0]]
    assert global_priority(values).tolist() == [[-3.0, -1.0], [-10.0, -20.0]]


def test_unknown_rule_and_bad_values() -> None:
    with pytest.raises(UsageError, match="no rule .best.; there are coverage, global, measured, uniform"):
        get_rule("best")
    for bad in (np.array([[1.0, np.nan]]), np.array([1.0, 2.0]), np.zeros((0, 4))):
        with pytest.raises(UsageError, match="finite numbers"):
            coverage_priority(bad)


@pytest.mark.parametrize(("keep", "budget"), [(0.6, 3686), (0.8, 4915), (1, 6144), (0.5, 3072), (1e-9, 0)])
def test_budget_is_rounded_to_the_nearest(keep, budget) -> None:
    assert budget_for(keep, 6144) == budget


def test_budget_rounds_halves_up_exactly() -> None:
    assert budget_for(0.15, 10) == 2  # 1.5, although 0.15 * 10 < 1.5 in binary
    assert budget_for(0.45, 10) == 5


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan"), float("inf")])
def test_keep_rates_out_of_range(keep) -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        budget_for(keep, 100)


def test_bisection_stops_inside_its_tolerance() -> None:
    priority = coverage_priority(np.random.default_rng(0).exponential(size=(8, 32)))
    for keep in (0.25, 0.6, 0.8):
        kept = bisection_budget(priority, keep, 0.01)
        assert abs(kept / 256 - keep) <= 0.01


def test_bisection_that_cannot_stop() -> None:
    with pytest.raises(UsageError, match="No alpha"):
        bisection_budget(np.zeros((2, 4)), 0.5, 0.01)
