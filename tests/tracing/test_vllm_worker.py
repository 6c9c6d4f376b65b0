"""What a vLLM worker counts, without an engine: passes as an engine would make them, fed by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from shape_moe.errors import UnsupportedModelError
from shape_moe.tracing.coalitions import tabulate
from shape_moe.tracing.vllm_worker import CoalitionCounter, from_bytes

EXPERTS, TOP_K, LAYERS = 16, 3, (1, 4)


def make_pass(rng, lengths):
    """Whole sequences one after the other, and what each router gave."""
    input_ids = rng.integers(0, 50, sum(lengths))
    positions = np.concatenate([np.arange(length) for length in lengths])
    routed = {
        layer: [np.stack([rng.choice(EXPERTS, TOP_K, replace=False) for _ in input_ids])] for layer in (0, *LAYERS)
    }
    return input_ids, positions, routed


def announced(input_ids, lengths, first_fold=0):
    starts = np.cumsum([0, *lengths])
    pieces = [(input_ids[a:b].tolist(), int(b - a)) for a, b in pairwise(starts)]
    return [(tokens, [[length // 2, length]], first_fold + i, i % 2) for i, (tokens, length) in enumerate(pieces)]


def test_counts_equal_those_of_one_table() -> None:
    rng = np.random.default_rng(0)
    first, second = make_pass(rng, [4, 7]), make_pass(rng, [5])
    sequences = announced(first[0], [4, 7]) + announced(second[0], [5], first_fold=2)
    counter = CoalitionCounter(LAYERS, EXPERTS, sequences)
    counter.add(*first)
    counter.add(*second)
    segments = np.array([0] * 2 + [1] * 2 + [0] * 3 + [1] * 4 + [0] * 2 + [1] * 3)
    folds = np.array([0] * 4 + [1] * 7 + [2] * 5)
    predicting = np.array([0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0])
    classes = np.array([0] * 4 + [1] * 7 + [0] * 5)
    for layer, found in counter.result().items():
        ids = np.concatenate([first[2][int(layer)][0], second[2][int(layer)][0]])
        expected = tabulate(ids, segments, folds, predicting, classes)
        np.testing.assert_array_equal(from_bytes(found["members"]), expected.members)
        np.testing.assert_array_equal(from_bytes(found["counts"]), expected.counts)
        np.testing.assert_array_equal(from_bytes(found["classes"]), expected.classes)
        tokens = from_bytes(found["tokens"])
        for token, row in enumerate(ids):
            tokens[classes[token], 2 * segments[token] + predicting[token], folds[token], row] -= 1
        assert not tokens.any()
    assert set(counter.result()) == {"1", "4"}  # layer 0 was not asked for


def test_alike_sequences_are_told_apart_by_their_order() -> None:
    rng = np.random.default_rng(1)
    input_ids, positions, routed = make_pass(rng, [4])
    counter = CoalitionCounter(LAYERS, EXPERTS, [(input_ids.tolist(), [[1, 4]], 0, 0), (input_ids.tolist(), [], 1, 0)])
    counter.add(input_ids, positions, routed)
    counter.add(input_ids, positions, routed)
    tokens = counter.tokens[1].sum(axis=-1) // TOP_K
    assert tokens[0, :, :2].tolist() == [[0, 4], [1, 0], [1, 0], [2, 0]]
    with pytest.raises(UnsupportedModelError, match="not sent, or one of them twice"):
        counter.add(input_ids, positions, routed)


def test_what_cannot_be_counted_is_refused() -> None:
    rng = np.random.default_rng(2)
    input_ids, positions, routed = make_pass(rng, [6])
    sequences = announced(input_ids, [6])

    def add(ids, places, router):
        CoalitionCounter(LAYERS, EXPERTS, sequences).add(ids, places, router)

    with pytest.raises(UnsupportedModelError, match="in pieces; switch chunked prefill and prefix caching off"):
        add(input_ids[2:], positions[2:], routed)
    with pytest.raises(UnsupportedModelError, match="not sent"):
        add(input_ids[:4], positions[:4], {layer: [calls[0][:4]] for layer, calls in routed.items()})
    with pytest.raises(UnsupportedModelError, match=r"Layer 1: the router reported 0 of 6 tokens"):
        add(input_ids, positions, {4: routed[4]})
    with pytest.raises(UnsupportedModelError, match=r"Layer 4: the router reported 3 of 6 tokens"):
        add(input_ids, positions, {**routed, 4: [routed[4][0][:3]]})
    with pytest.raises(UnsupportedModelError, match=r"reported 12 of 6 tokens"):
        add(input_ids, positions, {**routed, 1: routed[1] * 2})
