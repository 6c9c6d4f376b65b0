from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.evaluation.intervals import Bootstrap, Estimate, examples_for, least_fall, score_interval


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
    assert found.high == pytest.approx(1.959964**2 / (200 + 1.959964**2), abs=1e-6)
    assert found.low == pytest.approx(-found.high, abs=1e-12)
    for comparisons in (1, 4):
        found = Bootstrap(200, comparisons=comparisons).share_difference(right, right)
        assert least_fall(200, comparisons) == pytest.approx(found.high, abs=1e-12)
        enough = examples_for(0.01, comparisons)
        assert least_fall(enough, comparisons) <= 0.01 < least_fall(enough - 1, comparisons)


def likeliest_losses(gained: int, lost: int, count: int, difference: float) -> float:
    """The share of losses that makes counts likeliest where the shares differ by this much, by search."""
    low, high = max(0.0, -difference), (1 - difference) / 2
    shares = low + (high - low) * np.linspace(1e-9, 1 - 1e-9, 200_001)
    rest = np.maximum(1 - 2 * shares - difference, 1e-300)
    likelihood = gained * np.log(shares + difference) + lost * np.log(shares) + (count - gained - lost) * np.log(rest)
    return float(shares[np.argmax(likelihood)])


@pytest.mark.parametrize(("gained", "lost", "count"), [(12, 2, 50), (1, 3, 300), (0, 4, 200), (7, 7, 40), (2, 30, 60)])
def test_the_ends_of_a_score_interval_are_where_its_statistic_says(gained: int, lost: int, count: int) -> None:
    for end, sign in zip(score_interval(gained, lost, count, 1.96), (1, -1), strict=True):
        q = likeliest_losses(gained, lost, count, end)
        deviation = np.sqrt(count * (2 * q + end * (1 - end)))
        assert (gained - lost - count * end) / deviation == pytest.approx(sign * 1.96, abs=2e-3)


def test_score_intervals_against_known_ones() -> None:
    """The ends of Wilson's interval where nothing is lost, and the mirrored interval of the exchanged models."""
    for gained, count in ((0, 300), (3, 80), (40, 60)):
        share, z = gained / count, 1.96
        half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
        wilson = (share + z**2 / (2 * count) + half) / (1 + z**2 / count)
        assert score_interval(gained, 0, count, z)[1] == pytest.approx(wilson, abs=1e-9)
    low, high = score_interval(5, 2, 30, 1.96)
    assert score_interval(2, 5, 30, 1.96) == (pytest.approx(-high, abs=1e-12), pytest.approx(-low, abs=1e-12))
    assert score_interval(30, 0, 30, 1.96)[1] == pytest.approx(1)
    assert score_interval(0, 30, 30, 1.96)[0] == pytest.approx(-1)


@pytest.mark.parametrize(("lost", "gained", "count"), [(0.01, 0.0, 300), (0.01, 0.0, 400), (0.03, 0.01, 150)])
def test_a_score_interval_covers_rare_losses(lost: float, gained: float, count: int) -> None:
    """Most of all with the end that a limit is held to."""
    drawn = np.random.default_rng(8).multinomial(count, (gained, lost, 1 - gained - lost), size=2000)
    intervals = [score_interval(int(more), int(less), count, 1.96) for more, less, _ in drawn]
    assert np.mean([low <= gained - lost <= high for low, high in intervals]) >= 0.94
    assert np.mean([low <= gained - lost for low, _ in intervals]) >= 0.96


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
    assert fooled[8] <= 4  # of 60, where 1.5 are to be expected
    assert fooled[8] < fooled[1] / 2


def test_an_estimate_goes_through_json() -> None:
    estimate = Estimate(0.5, 0.25, 0.75)
    assert Estimate.from_document(estimate.to_document()) == estimate
    assert estimate.mapped(lambda x: 2 * x) == Estimate(1.0, 0.5, 1.5)
