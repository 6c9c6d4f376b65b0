"""Figures by hand: sums over tokens, paired changes with their sign, health at its limits, and what is faithful."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest

from shape_moe.evaluation.faithfulness import Faithfulness
from shape_moe.evaluation.generation import Generated, ends_in_loop
from shape_moe.evaluation.intervals import Bootstrap, Estimate, examples_for, least_fall
from shape_moe.evaluation.measures import by_group, change, health, quality, worst_group
from shape_moe.evaluation.teacher_forced import TeacherForced
from support.held_out import random_set

DENSE = TeacherForced(
    tokens=np.array([1, 3, 6]),
    nll=np.array([0.5, 0.6, 0.9]),
    kl=np.zeros(3),
    agree=np.array([1, 3, 6]),
    exact=np.array([True, True, False]),
)
PRUNED = TeacherForced(
    tokens=DENSE.tokens,
    nll=np.array([1.5, 0.6, 1.9]),
    kl=np.array([0.5, 0.1, 0.9]),
    agree=np.array([0, 3, 4]),
    exact=np.array([False, True, False]),
)


def test_figures_are_sums_over_tokens_not_means_over_examples() -> None:
    found = quality(PRUNED, Bootstrap(3), [0, 1, 2])
    assert found["nll"].value == pytest.approx(4.0 / 10)
    assert found["perplexity"].value == pytest.approx(exp(0.4))
    assert found["perplexity"].high == pytest.approx(exp(found["nll"].high))
    assert found["kl"].value == pytest.approx(1.5 / 10)
    assert found["top1"].value == pytest.approx(7 / 10)
    assert found["exact_match"].value == pytest.approx(1 / 3)


def test_exact_match_is_of_the_answered_examples() -> None:
    assert quality(PRUNED, Bootstrap(3), [1, 2])["exact_match"].value == 0.5
    assert change(PRUNED, DENSE, Bootstrap(3), [0, 1])["exact_match"].value == -0.5
    assert "exact_match" not in quality(PRUNED, Bootstrap(3), [])
    assert "exact_match" not in change(PRUNED, DENSE, Bootstrap(3), [])


def test_changes_are_the_model_less_the_dense_one() -> None:
    found = change(PRUNED, DENSE, Bootstrap(3), [0, 1, 2])
    assert found["nll"].value == pytest.approx((4.0 - 2.0) / 10)
    assert found["perplexity"].value == pytest.approx(exp(0.4) / exp(0.2))
    assert found["exact_match"].value == pytest.approx(-1 / 3)
    assert found["exact_match"].low < -1 / 3 < found["exact_match"].high
    back = change(DENSE, PRUNED, Bootstrap(3), [0, 1, 2])
    assert back["nll"].value == pytest.approx(-found["nll"].value)
    assert back["exact_match"].value == pytest.approx(1 / 3)


def test_a_class_is_judged_by_its_own_scored_examples_alone() -> None:
    held_out = random_set(6)  # two examples more: a plain text, and one of a single token that is never scored
    count = len(held_out.examples)
    held_out = replace(held_out, groups=("a", "b", None, "a", "b", "a", "a", "b"))
    tokens = np.arange(1, count + 1)
    tokens[-1] = 0
    nll, exact = np.arange(count) * 1.0, np.arange(count) % 2 == 0
    sums = TeacherForced(tokens, nll, np.zeros(count), tokens, exact)
    dense = replace(sums, nll=np.zeros(count), exact=np.ones(count, dtype=bool))
    found = by_group(held_out, sums, dense, Bootstrap(count))
    assert list(found) == ["a", "b"]
    # of class a, examples 0, 3 and 5 have a response, 6 is plain text; of class b, 1 and 4, and 7 is not scored
    assert found["a"]["quality"]["nll"].value == pytest.approx((0 + 3 + 5 + 6) / (1 + 4 + 6 + 7))
    assert found["a"]["quality"]["exact_match"].value == pytest.approx(1 / 3)
    assert found["b"]["quality"]["nll"].value == pytest.approx((1 + 4) / (2 + 5))
    assert found["b"]["change"]["exact_match"].value == pytest.approx(-1 / 2)


def test_classes_that_lost_alike_are_told_apart_by_name() -> None:
    def group(nll: float, exact: float) -> dict:
        return {"quality": {}, "change": {"nll": Estimate(nll, 0, 1), "exact_match": Estimate(exact, -1, 1)}}

    assert worst_group({"b": group(0, -0.5), "a": group(9, -0.5), "c": group(0, 0.5)}) == ("a", "exact_match")


def answers(lengths: list[int], looped: int = 0, open_ended: int = 0, exact: int = 0) -> Generated:
    count, order = len(lengths), np.arange(len(lengths))
    written = tuple((5,) * length for length in lengths)
    return Generated(tuple(range(count)), written, 50, order >= open_ended, order < looped, order < exact)


def complaints(made: Generated, dense: Generated) -> list[str]:
    return [text.split(" (")[0] for text in health(made, dense, Bootstrap(100)).complaints]


def test_answers_may_be_a_little_worse_than_the_dense_models_and_no_more() -> None:
    """Two in a hundred more that loop or do not end, and a quarter longer or shorter."""
    dense = answers([8] * 100, looped=5, open_ended=30)
    assert complaints(answers([8] * 100, looped=7, open_ended=32), dense) == []
    assert complaints(answers([8] * 100, looped=8, open_ended=30), dense) == ["8 % of the answers loop"]
    assert complaints(answers([8] * 100, looped=5, open_ended=33), dense) == ["33 % of the answers do not end"]
    assert complaints(answers([8] * 100), dense) == []  # better is no complaint
    assert complaints(answers([10] * 100), dense) == []
    assert complaints(answers([6] * 100), dense) == []
    for length in (5, 11):
        (text,) = complaints(answers([length] * 100), dense)
        assert text.startswith(f"answers have {length}.0 tokens on average")
    empty = answers([0] * 100)
    assert len(complaints(answers([1] * 100), empty)) == 1  # a quarter of one token, where the dense model has none


def test_what_is_said_of_answers() -> None:
    dense = answers([8] * 100, looped=5, open_ended=30, exact=90)
    found = health(answers([4, 12] * 50, looped=10, open_ended=20, exact=60), dense, Bootstrap(400))
    values = {name: estimate.value for name, estimate in found.figures.items()}
    assert values == {"loop_rate": 0.1, "no_end_rate": 0.2, "length": 8.0, "exact_match": 0.6}
    assert found.change["exact_match"].value == pytest.approx(-0.3)
    assert found.limit == 50
    assert "10 % of the answers loop (dense model: 5 %)" in found.complaints[0]
    own = health(dense, None, Bootstrap(400))
    assert (own.change, own.complaints) == ({}, ())


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([1, 2, 3, 4] * 4, True),
        ([9, 9, *[1, 2, 3, 4] * 4], True),
        ([1, 2, 3, 4, 5, 6] * 3, False),  # three copies are not enough
        ([1, 2, 3] * 5, False),  # 15 tokens are not enough
        ([7] * 16, True),
        ([*[7] * 16, 8], False),  # it must be the end that repeats
        ([8, *[7] * 15], False),
        ([*[1, 2, 3, 4, 5] * 3, 1, 2, 3, 4, 6], False),
    ],
)
def test_a_loop_is_four_copies_of_sixteen_tokens_at_the_end(tokens, loop) -> None:
    assert ends_in_loop(tokens) is loop


@pytest.mark.parametrize(
    ("kept", "random", "inverted", "faithful"),
    [
        (0.1, (0.2, 0.3, 0.4), 0.5, True),
        (0.2, (0.2, 0.3, 0.4), 0.5, False),  # as far as the best random one
        (0.25, (0.2, 0.3, 0.4), 0.5, False),
        (0.1, (0.2, 0.3, 0.7), 0.5, True),  # the random ones are closer than the inversion on average
        (0.1, (0.2, 0.3, 1.0), 0.5, False),
        (0.1, (0.5, 0.5, 0.5), 0.5, False),
    ],
)
def test_faithful_is_closer_than_any_random_choice_and_those_closer_than_the_inversion(
    kept, random, inverted, faithful
) -> None:
    def judged(kl: float):
        return SimpleNamespace(quality={"kl": Estimate(kl, 0.0, 9.0)}, change={})

    found = Faithfulness("s", judged(kept), judged(inverted), tuple(map(judged, random)))
    assert found.faithful is faithful


@pytest.mark.parametrize("comparisons", [1, 16])
def test_no_hit_at_all_leaves_the_upper_end_of_wilsons_interval(comparisons) -> None:
    z = NormalDist().inv_cdf(1 - 0.05 / 2 / comparisons)
    assert comparisons > 1 or z == pytest.approx(1.959964, abs=1e-6)
    found = Bootstrap(50, comparisons=comparisons).share(np.zeros(50))
    assert (found.value, found.low) == (0, pytest.approx(0, abs=1e-12))
    assert found.high == pytest.approx(z**2 / (50 + z**2))
    every = Bootstrap(50, comparisons=comparisons).share(np.ones(50))
    assert (every.value, every.high) == (1, pytest.approx(1))
    assert every.low == pytest.approx(50 / (50 + z**2))
    assert least_fall(50, comparisons) == pytest.approx(z**2 / (50 + z**2))
    assert examples_for(0.05, comparisons) == int(np.ceil(z**2 * 0.95 / 0.05))


def test_wilsons_interval_counts_where_the_bootstraps_is_narrower() -> None:
    """Its ends solve ``|p - share| = z sqrt(p (1 - p) / n)``."""
    hits = np.arange(30) < 2
    found = Bootstrap(30, seed=1).share(hits)
    z = NormalDist().inv_cdf(0.975)
    ends = [p for p in np.linspace(1e-6, 1 - 1e-6, 1_000_001) if abs(p - 2 / 30) <= z * np.sqrt(p * (1 - p) / 30)]
    assert found.high >= ends[-1] - 1e-5
    assert found.low <= ends[0] + 1e-5
    drawn = Bootstrap(30, seed=1).ratio(hits, np.ones(30))
    assert found.low == pytest.approx(min(drawn.low, ends[0]), abs=1e-5)
    assert found.high == pytest.approx(max(drawn.high, ends[-1]), abs=1e-5)


def test_intervals_of_many_candidates_reach_to_their_share_of_the_tail() -> None:
    values = np.random.default_rng(0).normal(size=80)
    one, ten = Bootstrap(80, 2), Bootstrap(80, 2, comparisons=10)
    drawn = (one.weights @ values) / 80
    for bootstrap, tail in ((one, 0.025), (ten, 0.0025)):
        found = bootstrap.ratio(values, np.ones(80))
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (tail, 1 - tail))))
    fewer = ten.of(40)
    assert (fewer.examples, fewer.seed, fewer.comparisons) == (40, 2, 10)
    assert ten.of(80) is ten


def test_resamples_without_a_token_say_nothing() -> None:
    below = np.array([1.0, 0.0, 0.0])
    found = Bootstrap(3, seed=0).ratio(np.array([2.0, 0.0, 0.0]), below)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_perplexity_is_what_it_says() -> None:
    assert quality(replace(DENSE, nll=DENSE.tokens * log(7.0)), Bootstrap(3), [])["perplexity"].value == pytest.approx(
        7
    )
