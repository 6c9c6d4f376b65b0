"""What each layer's cut costs, against whole passes of the masked model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import shape_moe
from shape_moe.architectures.sites import decoder_layers
from shape_moe.calibration.batches import batches
from shape_moe.evaluation.layer_costs import layer_costs
from shape_moe.jobs.measure import cuts_of
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from support.data import make_examples, trace_model
from support.tiny_models import make_model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("routing", ["drop", "reroute"])
@torch.no_grad()
def test_passes_from_a_layer_on_say_what_whole_passes_say(family: str, routing: str) -> None:
    model = make_model(family)
    examples = make_examples(6)
    examples = [replace(e, group="a" if i % 3 else "b") for i, e in enumerate(examples)]
    trace = trace_model(model, examples)
    counts, cuts = cuts_of(score_trace(trace, "frequency"), trace.info.routing, Method("frequency", routing=routing))
    assert set(cuts) == set(trace.info.layers)
    todo = list(batches(examples, 3, 0))
    done = []
    sums, tokens = layer_costs(model, todo, cuts, "ab".index, 2, done.append)
    assert sum(done) == len(todo) * len(cuts) * len(counts)
    expected, seen = np.zeros_like(sums), np.zeros((2, 2))
    for position, example in enumerate(examples):
        where = ("ab".index(example.group), position % 8 % 2)
        ids = torch.tensor([example.tokens])
        ((begin, end),) = example.spans
        places = range(max(begin - 1, 0), end - 1)
        seen[where] += len(places)
        dense = model(input_ids=ids, use_cache=False).logits[0, places].double().log_softmax(-1)
        for row, selections in enumerate(cuts.values()):
            for number, selection in enumerate(selections):
                with shape_moe.masked(model, selection):
                    pruned = model(input_ids=ids, use_cache=False).logits[0, places].double().log_softmax(-1)
                expected[(row, number, *where)] += float((dense.exp() * (dense - pruned)).sum())
    assert np.array_equal(tokens, seen)
    np.testing.assert_allclose(sums, expected, rtol=1e-3, atol=1e-5 * expected.max())
    assert expected.max() > 0.1


def test_the_model_is_given_back_as_it_was() -> None:
    model = make_model("qwen3_moe")
    examples = make_examples(3)
    trace = trace_model(model, examples)
    _, cuts = cuts_of(score_trace(trace, "frequency"), trace.info.routing, Method("frequency"))
    with pytest.raises(RuntimeError, match="stop"):
        layer_costs(model, list(batches(examples, 3, 0)), cuts, lambda _: 0, 1, _stop)
    for layer in decoder_layers(model).values():
        assert "forward" not in layer.__dict__
        assert not layer._forward_hooks


def _stop(_count: int) -> None:
    raise RuntimeError("stop")


def test_every_decoder_layer_is_found_dense_ones_too() -> None:
    model = make_model("qwen3_moe")
    assert decoder_layers(model) == dict(enumerate(model.model.layers))
