from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.evaluation.intervals import Bootstrap, Estimate


def test_the_bootstrap_is_the_naive_one() -> None:
    rng = np.random.default_rng(1)
    above, below = rng.normal(size=40), rng.integers(1, 9, 40)
    draws = Bootstrap(40, seed=5)
    found = draws.ratio(above, below)
    naive = []
    for weights in draws.weights:
        rows = np.repeat(np.arange(40), weights.astype(int))
        naive.append(above[rows].sum() / below[rows].sum())
    assert found.value == pytest.approx(above.sum() / below.sum(), abs=1e-12)
    assert found.low == pytest.approx(np.quantile(naive, 0.025), abs=1e-9)
    assert found.high == pytest.approx(np.quantile(naive, 0.975), abs=1e-9)


def test_intervals_of_a_mean_cover_it_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        sample = rng.exponential(size=60)
        found = Bootstrap(60, seed=trial).ratio(sample, np.ones(60))
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 300 <= 0.98


@pytest.mark.parametrize(("share", "count"), [(0.02, 100), (0.005, 200), (0.5, 60), (0.97, 80)])
def test_intervals_of_a_share_cover_it_also_near_the_ends(share: float, count: int) -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        found = Bootstrap(count, seed=trial).share(rng.uniform(size=count) < share)
        hits += found.low <= share <= found.high
    assert hits / 200 >= 0.93


def test_two_models_that_agreed_on_every_example_may_still_differ() -> None:
    right = np.ones(200, dtype=bool)
    found = Bootstrap(200).share_difference(right, right)
    assert found.value == 0
    assert found.low == pytest.approx(-0.0097, abs=2e-4)  # 1.96 / 202, the interval of Agresti and Min
    assert found.high == pytest.approx(0.0097, abs=2e-4)


def test_differences_of_shares_cover_the_truth() -> None:
    rng = np.random.default_rng(8)
    hits = 0
    for trial in range(200):
        dense = rng.uniform(size=150) < 0.9
        other = np.where(rng.uniform(size=150) < 0.03, ~dense, dense)
        truth = 0.03 * (0.1 - 0.9)
        found = Bootstrap(150, seed=trial).share_difference(other, dense)
        hits += found.low <= truth <= found.high
    assert hits / 200 >= 0.93


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(0, 9))
def test_an_interval_holds_its_value(hits, seed) -> None:
    found = Bootstrap(len(hits), seed).share(np.array(hits))
    assert found.low <= found.value <= found.high


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(2)
    hard = rng.exponential(size=80) * 10
    one, other = hard + rng.normal(size=80) * 0.01, hard
    paired = Bootstrap(80).ratio(one - other, np.ones(80))
    alone = Bootstrap(80).ratio(one, np.ones(80))
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)


def test_intervals_of_several_candidates_hold_together() -> None:
    """Of eight candidates that all lose as much as the limit, few may look as if they lost less."""
    rng = np.random.default_rng(4)
    dense, fooled = np.ones(300, dtype=bool), {1: 0, 8: 0}
    for trial in range(60):
        others = rng.uniform(size=(8, 300)) > 0.03
        for comparisons in fooled:
            draws = Bootstrap(300, trial, comparisons)
            fooled[comparisons] += any(-draws.share_difference(other, dense).low <= 0.03 for other in others)
    assert fooled[8] <= 12  # of 60: the formula is an approximation, and losses are rare
    assert fooled[8] < fooled[1] / 2


def test_an_estimate_goes_through_json() -> None:
    estimate = Estimate(0.5, 0.25, 0.75)
    assert Estimate.from_document(estimate.to_document()) == estimate
    assert estimate.mapped(lambda x: 2 * x) == Estimate(1.0, 0.5, 1.5)
