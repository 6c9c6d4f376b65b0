"""Agreement between scorers, against the textbook and against counting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shape_moe.reporting.figures.agreement import (
    agreement_figure,
    average_ranks,
    correlation_matrix,
    overlap_matrix,
    spearman,
)
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.selection.agreement import kept_by_scorer, options_of, scoring_of
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.tracing.token_weights import SegmentWeights
from support.data import routing_trace, synthetic_trace


def by_the_book(a: list[float], b: list[float]) -> float:
    """Pearson's correlation of ranks, where a rank is the mean place among all orders of equal values."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


@pytest.mark.parametrize("ties", [False, True])
def test_spearman(ties: bool) -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 6, 20))
    if ties:
        first, second = np.round(first), np.round(second * 2)
    found = spearman(first, second)
    assert found == pytest.approx([by_the_book(a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)])


def test_spearman_of_orders() -> None:
    values = np.arange(10.0)[None]
    assert spearman(values, values**3) == pytest.approx([1])
    assert spearman(values, -values) == pytest.approx([-1])
    assert np.isnan(spearman(values, np.zeros((1, 10)))).all()
    assert average_ranks(np.array([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[2.5, 0.0, 2.5, 1.0]]


def test_correlation_matrix_skips_constant_layers() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 8))
    values[0, 1] = 5.0
    scores = [Scores(f"s{i}", (0, 1, 2), values[i], np.zeros((3, 8))) for i in (0, 1)]
    matrix = correlation_matrix(scores)
    by_layer = [by_the_book(values[0, row].tolist(), values[1, row].tolist()) for row in (0, 2)]
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(np.mean(by_layer))
    assert matrix[0, 0] == pytest.approx(1)
    nothing = correlation_matrix([Scores("flat", (0,), np.zeros((1, 4)), np.zeros((1, 4)))] * 2)
    assert np.isnan(nothing).all()


def test_overlap_is_the_share_in_common() -> None:
    trace = synthetic_trace(layers=4, experts=16, top_k=3)
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    scores = [score_trace(trace, name) for name in ("shape", "reap", "random")]
    masks = kept_by_scorer(scores, selection, trace.info.routing)
    matrix = overlap_matrix([masks[entry.scorer] for entry in scores])
    sets = [{(int(row), int(e)) for row, e in np.argwhere(masks[entry.scorer])} for entry in scores]
    for i, first in enumerate(sets):
        for j, second in enumerate(sets):
            assert matrix[i, j] == pytest.approx(len(first & second) / len(first))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": Method("reap", "global")},
        {"method": Method("reap", "uniform", "reroute", "stock"), "keep": 0.5},
        {"skip_layers": (1,), "protect": {2: (0, 5)}},
        {"multiple_of": 4, "keep": 0.55, "allow_rounding": True},
        {"tolerance": 0.02, "keep": 0.55},
    ],
)
def test_the_selections_own_scorer_gives_the_selection_again(changes: dict) -> None:
    trace = synthetic_trace(layers=4, experts=16, top_k=3)
    selection = select_from_trace(trace, SelectOptions(**{"keep": 0.6, "method": Method("reap"), **changes}))
    masks = kept_by_scorer([score_trace(trace, name) for name in ("reap", "frequency")], selection, trace.info.routing)
    assert np.array_equal(masks["reap"], selection.mask())
    assert masks["frequency"].sum() == selection.kept


def test_a_selection_tells_its_scoring_and_target() -> None:
    scoring = ScoreOptions(SegmentWeights(0.25, 2.0), seed=7)
    trace = synthetic_trace(layers=2, experts=16, top_k=3)
    stock = SelectOptions(keep=0.5, method=Method("random", "uniform", "reroute", "stock"), scoring=scoring)
    selection = select_from_trace(trace, stock)
    assert scoring_of(selection) == scoring
    assert scoring_of(None) == ScoreOptions()
    assert selection.target == "stock"
    assert select_from_trace(trace, SelectOptions(keep=0.5)).target == "ragged"
    assert replace(selection, constraints={}, options={}).target == "ragged"


def test_an_unknown_rule_is_not_guessed() -> None:
    trace = synthetic_trace()
    selection = replace(select_from_trace(trace, SelectOptions(keep=0.5)), rule="their own")
    assert options_of(selection) is None
    assert kept_by_scorer([score_trace(trace, "shape")], selection, trace.info.routing) == {}


def test_figure_shows_both_matrices() -> None:
    trace = routing_trace()
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    scores = [score_trace(trace, name) for name in ("shape", "frequency", "random")]
    masks = kept_by_scorer(scores, selection, trace.info.routing)
    figure = agreement_figure(scores, masks, "half of them")
    assert [state.name for state in figure.states] == ["Rank correlation", "Overlap of kept sets"]
    assert figure.states[0].data[0]["z"] == pytest.approx(correlation_matrix(scores))
    assert figure.states[0].data[0]["text"][0][0] == "1.00"
    assert "shape and frequency" in figure.states[0].label or "frequency and shape" in figure.states[0].label
    assert len(agreement_figure(scores, {}, "").states) == 1
