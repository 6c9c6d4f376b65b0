"""The search over keep rates, on models whose loss is a known function of what they keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.errors import UsageError
from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.keep_rate import RESOLUTION, Limit, Point, bisect_keep_rates, grid, recommend
from shape_moe.evaluation.measures import Health, Measured
from shape_moe.selection.method import Method
from shape_moe.selection.selection import whole_selection

LIMIT = Limit("max_kl", 0.02)
WAY = Method("shape", "coverage", "drop")


def make(keep: float, kl: float, *, noise: float = 0.0, way: Method = WAY, fits: bool | None = None) -> Point:
    kept = max(1, round(100 * keep))
    whole = whole_selection([0], 100)
    selection = replace(whole, layers={0: list(range(kept))}, keep_asked=keep)
    measured = Measured({"kl": Estimate(kl, kl - noise, kl + noise)})
    return Point(way, selection, kept, measured, LIMIT.met(measured), fits)


def healthy(point: Point) -> Health:
    return Health({}, {}, 10)


def ill(point: Point) -> Health:
    return Health({}, {}, 10, ("answers loop",))


def each(judge):
    """A measure that judges points one by one."""
    return lambda asked: [judge(*one) for one in asked]


def smallest_passing(points) -> float:
    return min((point.selection.keep_asked for point in points if LIMIT.met(point.measured)), default=1.0)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.03, 0.97))
def test_bisection_finds_the_threshold(threshold) -> None:
    points = bisect_keep_rates([WAY], each(lambda _, keep: make(keep, 0.01 if keep >= threshold else 1.0)), LIMIT)
    assert threshold <= smallest_passing(points) <= threshold + RESOLUTION
    assert len(points) <= 7


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.03, 0.97), min_size=1, max_size=3), st.integers(2, 7))
def test_several_rates_at_once_find_every_threshold_in_fewer_rounds(thresholds, at_once) -> None:
    ways = [replace(WAY, scorer=scorer) for scorer in ("shape", "reap", "ean")][: len(thresholds)]
    threshold_of, rounds = dict(zip(ways, thresholds, strict=True)), []

    def measure(asked):
        rounds.append(asked)
        return each(lambda way, keep: make(keep, 0.01 if keep >= threshold_of[way] else 1.0, way=way))(asked)

    points = bisect_keep_rates(ways, measure, LIMIT, at_once=at_once)
    for way, threshold in threshold_of.items():
        found = [point for point in points if point.method == way]
        assert threshold <= smallest_passing(found) <= threshold + RESOLUTION
        assert len(found) == at_once * len(rounds)
    assert (at_once + 1) ** (len(rounds) - 1) < 1 / RESOLUTION <= (at_once + 1) ** len(rounds)


def test_bisection_treats_what_cannot_be_met_as_too_few() -> None:
    points = bisect_keep_rates([WAY], each(lambda _, keep: None if keep < 0.5 else make(keep, 0.0)), LIMIT)
    assert min(point.selection.keep_asked for point in points) == pytest.approx(0.5, abs=RESOLUTION)


def test_the_grid_leaves_out_what_cannot_be_met() -> None:
    ways = [WAY, Method("reap", "uniform", "reroute")]
    points = grid(
        ways, [0.2, 0.8], each(lambda way, keep: None if way.routing == "reroute" and keep < 0.5 else make(keep, 0))
    )
    assert [point.selection.keep_asked for point in points] == [0.8, 0.2, 0.8]


def test_the_smallest_point_within_the_limit_is_recommended() -> None:
    points = [make(0.9, 0.001), make(0.6, 0.01), make(0.5, 0.015, noise=0.01), make(0.3, 0.5)]
    advice = recommend(points, LIMIT, healthy)
    assert advice.chosen == advice.smallest == 1  # 0.5 is within by its value, not by its interval
    assert "Keep 60 % by" in advice.reason
    assert advice.points[1].healthy
    assert advice.points[0].healthy is None


def test_points_of_one_size_are_ordered_by_their_figure() -> None:
    other = Method("easy-ep", "uniform", "drop")
    assert recommend([make(0.6, 0.01), make(0.6, 0.005, way=other)], LIMIT, healthy).chosen == 1


def test_nothing_unhealthy_is_recommended() -> None:
    points = [make(0.9, 0.001), make(0.6, 0.01)]
    advice = recommend(points, LIMIT, lambda point: ill(point) if point.selection.keep < 0.7 else healthy(point))
    assert (advice.smallest, advice.chosen) == (1, 0)
    assert "unhealthy answers" in advice.reason
    none = recommend(points, LIMIT, ill)
    assert (none.smallest, none.chosen) == (1, None)
    assert [point.healthy for point in none.points] == [False, False]


def test_only_what_fits_is_recommended() -> None:
    points = [make(0.6, 0.01, fits=False), make(0.4, 0.5, fits=True)]
    advice = recommend(points, LIMIT, healthy)
    assert advice.chosen is None
    assert "of those that fit" in advice.reason


def test_a_fall_of_exact_match_is_judged_by_its_worse_end() -> None:
    limit = Limit("max_drop", 0.01)
    change = {"exact_match": Estimate(0.0, -0.02, 0.02)}
    measured = Measured({"kl": Estimate(0, 0, 0)}, change)
    assert limit.figure(measured) == Estimate(0.0, -0.02, 0.02)
    assert f"{limit.figure(measured).value:.1%}" == "0.0%"  # not -0.0%
    assert not limit.met(measured)
    assert Limit("max_drop", 0.03).met(measured)
    with pytest.raises(UsageError, match="needs held-out examples with responses"):
        limit.figure(Measured({"kl": Estimate(0, 0, 0)}))


@pytest.mark.parametrize(("kind", "value"), [("max_kl", 0), ("max_drop", 1.0), ("max_drop", -0.1), ("max_loss", 0.1)])
def test_senseless_limits_are_refused(kind, value) -> None:
    with pytest.raises(UsageError):
        Limit(kind, value)
