"""Segment weights: every scorer counts prompt and response tokens as it is told, and never one for the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shape_moe.scoring.registry import ScoreOptions, scorers
from shape_moe.scoring.scores import score_trace
from shape_moe.scoring.shape import shape_values
from shape_moe.tracing.coalitions import CoalitionTable
from shape_moe.tracing.token_weights import SegmentWeights
from shape_moe.tracing.trace import Trace
from support import brute_force
from support.data import synthetic_trace

PROMPT, RESPONSE = 0, 1
SCORERS = [name for name in scorers() if name != "random"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthetic_trace(layers=2, experts=9, top_k=3, tokens=150, seed=4)


def only(trace: Trace, segment: int) -> Trace:
    """The trace of the tokens of one segment alone."""
    statistics = {name: values.copy() for name, values in trace.statistics.items()}
    others = [2 * (1 - segment), 2 * (1 - segment) + 1]
    for values in statistics.values():
        values[:, :, others] = 0
    coalitions = {}
    for layer, table in trace.coalitions.items():
        counts = table.counts.copy()
        counts[:, 1 - segment :: 2] = 0
        coalitions[layer] = CoalitionTable(table.members, counts)
    return replace(trace, statistics=statistics, coalitions=coalitions)


ALIKE = ScoreOptions(SegmentWeights())


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("segment", [PROMPT, RESPONSE])
def test_a_weight_of_zero_leaves_a_segment_out(trace, name, segment) -> None:
    weights = SegmentWeights(prompt=float(segment == PROMPT), response=float(segment == RESPONSE))
    found = score_trace(trace, name, ScoreOptions(weights))
    expected = score_trace(only(trace, segment), name, ALIKE)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
    np.testing.assert_allclose(found.activations, expected.activations, rtol=1e-12)
    assert not np.allclose(expected.values, score_trace(only(trace, 1 - segment), name, ALIKE).values)


@pytest.mark.parametrize(("prompt", "response"), [(0.25, 2.0), (3.0, 1.0), (1.0, 0.5)])
def test_shape_values_are_those_of_weighted_counts(trace, prompt, response) -> None:
    values = score_trace(trace, "shape", ScoreOptions(SegmentWeights(prompt, response))).values
    for row, layer in enumerate(trace.info.layers):
        table = trace.coalitions[layer]
        weighted = prompt * table.counts[:, PROMPT] + response * table.counts[:, RESPONSE]
        expected = np.array([float(value) for value in brute_force.shape_values(table.members, weighted, 9)])
        np.testing.assert_allclose(values[row], expected, rtol=1e-9)
        np.testing.assert_allclose(values[row], shape_values(table.members, weighted, 9), rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in SCORERS if name not in {"shape", "reap", "reap-received"}])
def test_sums_are_linear_in_the_weights(trace, name) -> None:
    prompt, response = (score_trace(only(trace, segment), name, ALIKE).values for segment in (PROMPT, RESPONSE))
    both = score_trace(trace, name, ScoreOptions(SegmentWeights(0.25, 2.0))).values
    np.testing.assert_allclose(both, 0.25 * prompt + 2.0 * response, rtol=1e-9, atol=1e-12 * np.abs(both).max())


def test_the_largest_norm_is_not_weighted(trace) -> None:
    """A maximum over the tokens that count at all."""
    norms = trace.statistics["largest_norm"]
    for weights, cells in ((SegmentWeights(0.5, 3.0), (0, 1, 2, 3)), (SegmentWeights(2.0, 0.0), (0, 1))):
        np.testing.assert_array_equal(trace.sums("largest_norm", weights), norms[:, 0, cells].max(axis=(1, 2)))


def test_halves_are_even_and_odd_folds(trace) -> None:
    for half in (0, 1):
        part = trace.half(half)
        for name in ("tokens", "gate", "largest_norm"):
            folds = trace.statistics[name][:, 0, :, half::2]
            expected = folds.max(axis=(1, 2)) if name == "largest_norm" else folds.sum(axis=(1, 2))
            np.testing.assert_allclose(part.sums(name), expected, rtol=1e-12)
        pairs = trace.statistics["gram_relative"][:, 0, :, half].sum(axis=1)
        np.testing.assert_allclose(part.sums("gram_relative"), pairs, rtol=1e-12)
        for layer, table in part.coalitions.items():
            tokens = np.zeros(9)
            np.add.at(tokens, table.members, table.weighted()[:, None])
            np.testing.assert_array_equal(tokens, part.sums("tokens")[trace.info.layers.index(layer)])
            assert (table.weighted() > 0).all()
