"""Scores of several classes: brute force, and what must make no difference."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shape_moe.scoring.classes import joined
from shape_moe.scoring.registry import ScoreOptions, scorers
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.rules import rules
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.tracing.classes import in_classes
from shape_moe.tracing.trace import Trace, merge_traces
from support.data import synthetic_trace

SCORERS, RULES = sorted(scorers()), sorted(rules())
KEEP = 0.5


def naive_joined(classes: list[np.ndarray], *, by_layer: bool) -> np.ndarray:
    """In exact fractions, one expert at a time."""
    layers, experts = classes[0].shape
    result = np.zeros((layers, experts))
    for layer in range(layers):
        for expert in range(experts):
            shares = []
            for values in classes:
                rows = [layer] if by_layer else range(layers)
                whole = sum(max(Fraction(v), Fraction(0)) for row in rows for v in values[row].tolist())
                if whole == 0:
                    whole = sum(abs(Fraction(v)) for row in rows for v in values[row].tolist())
                shares.append(Fraction(float(values[layer, expert])) / whole if whole else Fraction(0))
            result[layer, expert] = float(max(shares))
    return result


def made(seed: int, classes: tuple[str, ...] = ("a", "b", "c"), **others) -> Trace:
    return synthetic_trace(layers=3, experts=8, top_k=2, tokens=240, seed=seed, classes=classes, **others)


def kept(trace: Trace, scorer: str, rule: str, options: ScoreOptions | None = None) -> dict[int, list[int]]:
    return select_from_trace(trace, SelectOptions(KEEP, Method(scorer, rule), options or ScoreOptions())).layers


def renumbered(trace: Trace, order: list[int]) -> Trace:
    """The same trace with its classes in another order."""
    names = trace.info.classes
    return in_classes(trace, names, tuple(names[place] for place in order))


def repeated(trace: Trace, name: str, times: int) -> Trace:
    """The trace in which every example of one class came so many times."""
    others = [part for part in trace.info.classes if part != name]
    parts = [trace.of_class(trace.info.classes.index(part)) for part in [name] * times + others]
    return merge_traces(parts)


finite = st.floats(-1e3, 1e3).map(lambda x: 0.0 if abs(x) < 1e-6 else x)


@given(
    st.lists(arrays(np.float64, (2, 4), elements=finite), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_joining_is_the_largest_share_of_any_class(classes, by_layer) -> None:
    found = joined(classes, by_layer=by_layer)
    np.testing.assert_allclose(found, naive_joined(classes, by_layer=by_layer), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scorer", [name for name in SCORERS if scorers()[name].needs])
def test_the_score_of_a_trace_is_its_classes_joined(scorer) -> None:
    """Every class is scored as a trace of its own would be."""
    trace = made(1)
    alone = [score_trace(merge_traces([trace.of_class(c)]), scorer).values for c in range(3)]
    for by_layer in (True, False):
        found = score_trace(trace, scorer, ScoreOptions(by_layer=by_layer))
        np.testing.assert_allclose(found.values, naive_joined(alone, by_layer=by_layer), rtol=1e-12)
        assert found.joined
        np.testing.assert_array_equal(found.activations, trace.sums("tokens", scorers()[scorer].weights))


def test_layers_are_shares_for_coverage_and_uniform_and_the_model_for_global() -> None:
    """Class a has all its value in layer 0, class b in layer 1; within layers both have the same right to be there."""
    values = {
        "a": np.array([[8.0, 4.0, 2.0, 1.0], [0.3, 0.2, 0.1, 0.0]]),
        "b": np.array([[0.0, 0.1, 0.2, 0.3], [1.0, 2.0, 4.0, 8.0]]),
    }
    trace = synthetic_trace(layers=2, experts=4, top_k=2, classes=("a", "b"))
    gate = np.zeros_like(trace.statistics["gate"])
    for place, name in enumerate(values):
        gate[:, place, 0, 0] = values[name]
    trace = replace(trace, statistics={**trace.statistics, "gate": gate})
    assert kept(trace, "gating", "uniform") == {0: [0, 3], 1: [0, 3]}
    assert kept(trace, "gating", "global") == {0: [0, 1], 1: [2, 3]}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_one_class_is_all_examples_pooled(scorer, rule) -> None:
    trace = made(2, ("only",))
    without = replace(trace, info=replace(trace.info, classes=("",)))
    assert kept(trace, scorer, rule) == kept(without, scorer, rule)
    assert kept(trace, scorer, rule) == kept(trace, scorer, rule, ScoreOptions(pool_classes=True))
    assert select_from_trace(trace, SelectOptions(KEEP)).classes == ()


@pytest.mark.parametrize("scorer", SCORERS)
def test_pooled_classes_are_one_trace_of_all_examples(scorer) -> None:
    trace = made(3)
    whole = merge_traces(
        [replace(part, info=replace(part.info, classes=("",))) for part in map(trace.of_class, range(3))], pool=True
    )
    assert whole.info.classes == ("",)
    pooled = ScoreOptions(pool_classes=True)
    np.testing.assert_allclose(score_trace(trace, scorer, pooled).values, score_trace(whole, scorer).values, rtol=1e-12)
    assert select_from_trace(trace, SelectOptions(KEEP, scoring=pooled)).pooled


@given(st.integers(0, 2**16), st.permutations(range(3)), st.sampled_from(SCORERS), st.sampled_from(RULES))
@settings(max_examples=40, deadline=None)
def test_the_order_of_classes_makes_no_difference(seed, order, scorer, rule) -> None:
    trace = made(seed)
    assert kept(renumbered(trace, list(order)), scorer, rule) == kept(trace, scorer, rule)


@given(
    st.integers(0, 2**16),
    st.integers(2, 5),
    st.sampled_from("abc"),
    st.sampled_from(SCORERS),
    st.sampled_from(RULES),
)
@settings(max_examples=40, deadline=None)
def test_more_of_the_same_class_makes_no_difference(seed, times, name, scorer, rule) -> None:
    trace = made(seed)
    more = repeated(trace, name, times)
    assert more.info.classes == trace.info.classes
    assert more.sums("tokens").sum() > trace.sums("tokens").sum()
    for by_layer in (True, False):
        options = ScoreOptions(by_layer=by_layer)
        found, expected = score_trace(more, scorer, options), score_trace(trace, scorer, options)
        np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
        if found.joined:
            np.testing.assert_allclose(found.tiebreak, expected.tiebreak, rtol=1e-12)
    assert kept(more, scorer, rule) == kept(trace, scorer, rule)


def test_a_class_without_tokens_that_count_does_not_decide() -> None:
    trace = made(4, ("a", "b"))
    statistics = {name: array.copy() for name, array in trace.statistics.items()}
    for array in statistics.values():
        array[:, 1] = 0
    silent = replace(
        trace,
        statistics=statistics,
        coalitions={layer: table.of_class(0) for layer, table in trace.coalitions.items()},
    )
    alone = trace.of_class(0)
    for scorer in ("shape", "reap", "contribution"):
        for rule in RULES:
            assert kept(silent, scorer, rule) == kept(alone, scorer, rule)


def test_classes_without_any_token_that_counts_score_zero() -> None:
    """As of a task without responses whose response tokens alone are counted."""
    trace = made(5, classes=("a", "b"))
    coalitions = {
        layer: replace(table, counts=np.zeros_like(table.counts)) for layer, table in trace.coalitions.items()
    }
    empty = {name: np.zeros_like(trace.statistics[name]) for name in trace.statistics}
    scores = score_trace(replace(trace, statistics=empty, coalitions=coalitions), "reap")
    zeros = np.zeros((3, 8))
    assert (scores.scorer, scores.layers) == ("reap", trace.info.layers)
    for found in (scores.values, scores.activations):
        np.testing.assert_array_equal(found, zeros)
