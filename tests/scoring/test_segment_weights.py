"""Weights of segments in every scorer: prompt weights multiply prompt tokens, response weights response tokens."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from shape_moe.scoring.registry import ScoreOptions, scorers
from shape_moe.scoring.scores import score_trace
from shape_moe.tracing.trace import SegmentWeights, Trace
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


def test_every_scorer_that_reads_a_trace_is_looked_at_here() -> None:
    others = {"shape", "reap", "reap-received", "random"}
    assert set(scorers()) == {*SUMS, *others}
