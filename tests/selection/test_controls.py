"""Controls remove other experts at the same counts, and what is compared is chosen under the same conditions."""

from __future__ import annotations

import numpy as np
import pytest

from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.scoring.scores import Scores
from shape_moe.selection.agreement import kept_by_scorer, options_of, scoring_of
from shape_moe.selection.controls import inverted_selection, random_selection
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_scores, select_from_trace
from shape_moe.selection.selection import Selection
from shape_moe.selection.stability import stability
from support.data import synthetic_trace

VALUES = np.array([[8.0, 7, 6, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6, 7, 8]])
SCORES = Scores("reap", (2, 5), VALUES, np.ones((2, 8)))
OPTIONS = SelectOptions(
    keep=0.625, method=Method(rule="global"), protect={5: (0,)}, skip_layers=(2,), multiple_of=2, allow_rounding=True
)


@pytest.fixture(scope="module")
def selection() -> Selection:
    return select_from_scores(SCORES, SelectOptions(keep=0.375, method=Method(rule="global"), protect={2: (7,)}))


def test_the_inversion_keeps_the_worst_at_the_same_counts(selection) -> None:
    assert selection.layers == {2: [0, 1, 2, 7], 5: [6, 7]}
    inverted = inverted_selection(selection, SCORES)
    assert inverted.layers == {2: [4, 5, 6, 7], 5: [0, 1]}
    assert (inverted.scorer, inverted.alpha, inverted.stability) == ("reap, inverted", None, None)
    in_groups = inverted_selection(selection, SCORES, groups=2)
    assert in_groups.layers == {2: [1, 2, 3, 7], 5: [4, 5]}


def test_of_equal_values_the_inversion_removes_the_ones_used_more() -> None:
    activations = np.array([[1.0, 9, 1, 1]])
    scores = Scores("t", (0,), np.ones((1, 4)), activations)
    chosen = select_from_scores(scores, SelectOptions(keep=0.5, method=Method(rule="uniform")))
    assert chosen.layers == {0: [0, 1]}
    assert inverted_selection(chosen, scores).layers == {0: [2, 3]}


def test_random_controls_keep_counts_and_groups_and_follow_their_seed(selection) -> None:
    drawn = [random_selection(selection, seed) for seed in range(40)]
    assert [random_selection(selection, seed) for seed in range(40)] == drawn
    for control in drawn:
        assert [len(set(ids)) for ids in control.layers.values()] == [4, 2]
        assert all(ids == sorted(ids) and ids[0] >= 0 and ids[-1] < 8 for ids in control.layers.values())
    assert {expert for control in drawn for expert in control.layers[2]} == set(range(8))
    for seed in range(20):
        grouped = random_selection(selection, seed, groups=2).layers
        assert [sum(expert < 4 for expert in ids) for ids in grouped.values()] == [3, 0]


def test_the_options_of_a_selection_make_it_again() -> None:
    chosen = select_from_scores(SCORES, OPTIONS)
    assert chosen.layers == {2: list(range(8)), 5: [0, 7]}
    found = options_of(chosen)
    assert found is not None
    assert (found.skip_layers, found.protect, found.multiple_of) == ((2,), {5: (0,)}, 2)
    assert (found.keep, str(found.method)) == (0.625, "reap/global, drop")
    assert select_from_scores(SCORES, found).layers == chosen.layers


def test_other_scorers_keep_as_many_under_the_same_conditions() -> None:
    chosen = select_from_scores(SCORES, OPTIONS)
    other = Scores("ean", SCORES.layers, VALUES[::-1].copy(), SCORES.activations)
    masks = kept_by_scorer([SCORES, other], chosen, None)
    assert np.array_equal(masks["reap"], chosen.mask())
    assert [np.flatnonzero(row).tolist() for row in masks["ean"]] == [list(range(8)), [0, 1]]
    routing = RouterFacts(2, 2)
    rerouted = select_from_scores(
        SCORES, SelectOptions(keep=0.5, method=Method(rule="global", routing="reroute")), routing=routing
    )
    lopsided = Scores("ean", SCORES.layers, VALUES * np.array([[1], [100]]), SCORES.activations)
    counts = kept_by_scorer([lopsided], rerouted, routing)["ean"].sum(axis=1)
    assert counts.tolist() == [2, 6]  # the floor of the routing, which a drop would not have


def test_the_weights_and_the_seed_of_a_selection_are_found_again() -> None:
    trace = synthetic_trace(tokens=60)
    from shape_moe.scoring.registry import ScoreOptions
    from shape_moe.tracing.token_weights import SegmentWeights

    asked = ScoreOptions(SegmentWeights(prompt=0.25, response=2.0), seed=7)
    chosen = select_from_trace(trace, SelectOptions(keep=0.5, scoring=asked))
    assert scoring_of(chosen) == asked
    assert scoring_of(None) == ScoreOptions()


def test_a_selection_says_what_was_asked_and_what_was_met() -> None:
    chosen = select_from_scores(SCORES, SelectOptions(0.7, Method(rule="global"), multiple_of=2, allow_rounding=True))
    assert (chosen.constraints["budget_asked"], chosen.kept) == (11, 10)
    assert (chosen.keep_asked, chosen.keep) == (0.7, 0.625)


def test_layers_are_protected_and_skipped_by_their_number_not_their_row() -> None:
    chosen = select_from_scores(SCORES, SelectOptions(keep=0.5, method=Method(rule="global"), protect={5: (0, 1)}))
    assert {0, 1} <= set(chosen.layers[5])
    skipped = select_from_scores(SCORES, SelectOptions(keep=0.75, method=Method(rule="global"), skip_layers=(5,)))
    assert skipped.layers == {2: [0, 1, 2, 3], 5: list(range(8))}


def test_agreement_is_of_the_kept_places() -> None:
    first = np.array([[True, True, True, False], [True, False, False, False]])
    second = np.array([[True, False, True, True], [False, False, True, False]])
    assert stability(first, second) == {"agreement": 0.5, "undecided": 2.0}
