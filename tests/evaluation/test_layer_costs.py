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
from shape_moe.jobs.curves import counts_for, cuts_of
from shape_moe.journal import Journal
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
    method, facts = Method("frequency", routing=routing), trace.info.routing
    counts = counts_for(trace.info.num_experts, facts, method)
    cuts = cuts_of(score_trace(trace, "frequency"), facts, method, counts)
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
    cuts = cuts_of(score_trace(trace, "frequency"), trace.info.routing, Method("frequency"), (2,))
    with pytest.raises(RuntimeError, match="stop"):
        layer_costs(model, list(batches(examples, 3, 0)), cuts, lambda _: 0, 1, _stop)
    for layer in decoder_layers(model).values():
        assert "forward" not in layer.__dict__
        assert not layer._forward_hooks


def test_an_interrupted_measurement_goes_on_to_the_last_bit_without_repeating_passes(tmp_path) -> None:
    model, examples = make_model("qwen3_moe"), make_examples(6)
    trace = trace_model(model, examples)
    cuts = cuts_of(score_trace(trace, "frequency"), trace.info.routing, Method("frequency"), (2, 5))
    todo = list(batches(examples, 2, 0))
    whole = layer_costs(model, todo, cuts, lambda _: 0, 1, lambda _: None)
    passes = []

    def stop_at_seven(count: int) -> None:
        passes.append(count)
        if sum(passes) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer_costs(model, todo, cuts, lambda _: 0, 1, stop_at_seven, Journal(tmp_path / "j", "part", "sums"), "a")
    journal = Journal(tmp_path / "j", "part", "sums")
    assert len(journal) == 3  # six passes of two counts each were whole
    run = [0]
    handle = decoder_layers(model)[max(cuts)].register_forward_pre_hook(lambda *_: run.__setitem__(0, run[0] + 1))
    again = layer_costs(model, todo, cuts, lambda _: 0, 1, lambda _: None, journal, "a")
    handle.remove()
    assert all(np.array_equal(a, b) for a, b in zip(again, whole, strict=True))
    every = len(todo) * (1 + 2 * len(cuts))  # the last layer runs in every pass, and in the dense one of each batch
    whole_batches = 3 // len(cuts)
    assert run[0] == every - 2 * 3 - whole_batches
    other = layer_costs(model, todo, cuts, lambda _: 0, 1, lambda _: None, journal, "b")
    assert np.array_equal(other[0], whole[0])
    assert len(journal) == 3 + len(todo) * len(cuts) - 3 + len(todo) * len(cuts)


def test_a_pass_starts_at_the_layer_that_is_cut() -> None:
    model, examples = make_model("qwen3_moe"), make_examples(3)
    trace = trace_model(model, examples)
    cuts = cuts_of(score_trace(trace, "frequency"), trace.info.routing, Method("frequency"), (2, 5))
    todo, layers = list(batches(examples, 3, 0)), decoder_layers(model)
    entered = dict.fromkeys(layers, 0)
    hooks = []
    for number, layer in layers.items():

        def count(*_args: object, number: int = number) -> None:
            entered[number] += 1

        hooks.append(layer.input_layernorm.register_forward_pre_hook(count))
    layer_costs(model, todo, cuts, lambda _: 0, 1, lambda _: None)
    for hook in hooks:
        hook.remove()
    assert entered == {n: len(todo) * (1 + 2 * sum(cut <= n for cut in cuts)) for n in layers}


def _stop(_count: int) -> None:
    raise RuntimeError("stop")


def test_every_decoder_layer_is_found_dense_ones_too() -> None:
    model = make_model("qwen3_moe")
    assert decoder_layers(model) == dict(enumerate(model.model.layers))
