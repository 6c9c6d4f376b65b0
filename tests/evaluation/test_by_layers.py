"""A model judged layer by layer has the figures that the bench finds with the whole model in memory."""

from __future__ import annotations

import numpy as np
import pytest

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.layered_bench import LayeredBench
from support.data import make_examples
from support.selections import random_selection


def held_out() -> HeldOutSet:
    examples = tuple(make_examples(9, seed=3))
    return HeldOutSet("the set", examples, (None,) * len(examples), 2, vocabulary=128)


@pytest.mark.parametrize("routing", ["drop", "reroute"])
def test_figures_are_the_benchs(family, routing, checkpoint) -> None:
    snapshot, examples = open_snapshot(checkpoint(family)), held_out()
    selections = [random_selection(snapshot, routing, "ragged", seed=seed) for seed in (0, 1)]
    model = LayeredModel(snapshot, device="cpu", dtype="float32")
    with LayeredBench(model, examples) as layered:
        layered.prepare(selections)
        found = [layered.dense_sums, *map(layered.sums, selections)]
        assert layered.readings == 1
    assert model.bytes_read == snapshot.total_bytes  # once, for all three
    whole = load_model(snapshot, device="cpu", dtype="float32")
    with Bench(whole, None, examples) as bench:
        expected = [bench.dense_sums, *(bench.sums(selection) for selection in selections)]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("tokens", "agree", "exact", "nll"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        np.testing.assert_allclose(ours.kl, theirs.kl, rtol=1e-5, atol=1e-6)
    assert found[1].kl.sum() > 0.01
