"""Weights of segments in every scorer: prompt weights multiply prompt tokens, response weights response tokens."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from shape_moe.errors import UsageError
from shape_moe.scoring.registry import ScoreOptions, scorers
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.agreement import scoring_of
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.tracing.token_weights import PredictingWeights, SegmentWeights, token_weights
from shape_moe.tracing.trace import Trace
from support import brute_force
from support.data import synthetic_trace

PROMPT, RESPONSE = 0.125, 3.0
WEIGHTED = ScoreOptions(SegmentWeights(PROMPT, RESPONSE))
SUMS = {
    "frequency": "tokens",
    "gating": "gate",
    "gating-renormalised": "gate_renormalised",
    "ean": "norm",
    "easy-ep": "gated_norm_turned",
    "contribution": "contribution_relative",
    "contribution-raw": "contribution",
    "replacement": "replacement",
    "replacement-trained": "replacement_trained",
}


def weighted(trace: Trace, name: str) -> np.ndarray:
    """A statistic's weighted sum [L, E], written out."""
    array = trace.statistics[name].astype(np.float64)
    weights = (PROMPT, PROMPT, RESPONSE, RESPONSE)
    return sum(w * array[:, 0, cell, fold] for cell, w in enumerate(weights) for fold in range(array.shape[3]))


def test_shape_counts_prompt_and_response_tokens_by_their_own_weights() -> None:
    trace = synthetic_trace(top_k=3)
    found = score_trace(trace, "shape", WEIGHTED).values
    for row, table in enumerate(trace.coalitions.values()):
        counts = [Fraction(PROMPT) * int(c[0]) + Fraction(RESPONSE) * int(c[1]) for c in table.counts]
        expected = [float(value) for value in brute_force.shape_values(table.members, counts, 8)]
        np.testing.assert_allclose(found[row], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("scorer", SUMS)
def test_sums_weigh_each_segment_by_its_own_weight(scorer: str) -> None:
    trace = synthetic_trace()
    expected = weighted(trace, SUMS[scorer])
    np.testing.assert_allclose(score_trace(trace, scorer, WEIGHTED).values, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("scorer", "statistic"), [("reap", "gated_norm_renormalised"), ("reap-received", "gated_norm")]
)
def test_means_weigh_tokens_and_what_they_divide_alike(scorer: str, statistic: str) -> None:
    trace = synthetic_trace(tokens=3000)  # every expert serves some of them
    expected = weighted(trace, statistic) / weighted(trace, "tokens")
    np.testing.assert_allclose(score_trace(trace, scorer, WEIGHTED).values, expected, rtol=1e-12)


PREDICTING = PredictingWeights(0.75, 3.0)
OURS = {"contribution", "contribution-raw", "replacement", "replacement-trained"}


@pytest.mark.parametrize("scorer", SUMS)
def test_sums_weigh_tokens_by_what_they_predict(scorer: str) -> None:
    trace = synthetic_trace()
    array = trace.statistics[SUMS[scorer]][:, 0].astype(np.float64).sum(axis=2)  # layer, cell, expert
    expected = 3.0 * (array[:, 0] + array[:, 2]) + 0.75 * (array[:, 1] + array[:, 3])
    np.testing.assert_allclose(score_trace(trace, scorer, ScoreOptions(PREDICTING)).values, expected, rtol=1e-12)


def test_shape_counts_tokens_by_what_they_predict() -> None:
    trace = synthetic_trace(top_k=3)
    found = score_trace(trace, "shape", ScoreOptions(PREDICTING)).values
    for row, table in enumerate(trace.coalitions.values()):
        cells = table.by_cell().tolist()
        counts = [Fraction(0.75) * (c[1] + c[3]) + 3 * (c[0] + c[2]) for c in cells]
        expected = [float(value) for value in brute_force.shape_values(table.members, counts, 8)]
        np.testing.assert_allclose(found[row], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("scorer", sorted({*SUMS, "shape", "reap", "reap-received"}))
def test_our_own_scorers_weigh_predicting_tokens_and_the_published_ones_count_all_alike(scorer: str) -> None:
    trace = synthetic_trace()
    weights = PredictingWeights(1.0, 0.25) if scorer in OURS else SegmentWeights(1.0, 1.0)
    found = score_trace(trace, scorer).values
    assert np.array_equal(found, score_trace(trace, scorer, ScoreOptions(weights)).values)
    chosen = select_from_trace(trace, SelectOptions(0.5, Method(scorer)))
    assert chosen.options == {**weights.flags, "seed": 0}
    assert scoring_of(chosen).weights is None


def test_where_a_trace_cannot_tell_them_apart_all_tokens_count_alike() -> None:
    trace = synthetic_trace()
    old = replace(trace, info=replace(trace.info, cells=2))
    found = score_trace(old, "contribution").values
    assert np.array_equal(found, score_trace(old, "contribution", ScoreOptions(SegmentWeights())).values)
    assert any("count all tokens alike" in remark for remark in old.remarks)
    with pytest.raises(UsageError, match="cannot be weighted by what they predict"):
        score_trace(old, "contribution", ScoreOptions(PREDICTING))
    with pytest.raises(UsageError, match="cannot be weighted by what they predict"):
        score_trace(old, "shape", ScoreOptions(PREDICTING))


def test_weights_are_of_one_kind() -> None:
    assert token_weights({"prompt": None, "seed": 3}) is None
    assert token_weights({"response": 2}) == SegmentWeights(1.0, 2.0)
    assert token_weights({"other": 0}) == PredictingWeights(1.0, 0.0)
    with pytest.raises(UsageError, match="not by both"):
        token_weights({"prompt": 1, "other": 1})
    with pytest.raises(UsageError, match="one of them must be positive"):
        token_weights({"predicting": 0, "other": 0})


def test_every_scorer_that_reads_a_trace_is_looked_at_here() -> None:
    others = {"shape", "reap", "reap-received", "random"}
    assert set(scorers()) == {*SUMS, *others}
