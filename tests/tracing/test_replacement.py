"""The replacement statistic against routing a token again for real, and against masking one expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import shape_moe
from shape_moe.calibration.batches import batches, make_batch
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import UsageError
from shape_moe.jobs.session import ExampleOptions
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.selection import Selection, whole_selection
from shape_moe.tracing.replacement import WiderChoice, next_ids_and_weights
from shape_moe.tracing.token_weights import PredictingWeights
from shape_moe.tracing.trace import Trace
from shape_moe.tracing.transformers_model import ModelTracer
from support.data import make_examples, trace_model
from support.naive_replacement import naive_replacement
from support.naive_trace import capture
from support.tiny_models import FAMILIES, GROUPED, make_model, moe_block, router_of

UNGROUPED = tuple(family for family in FAMILIES if family not in GROUPED)
NAMES = ("replacement", "replacement_trained")


def check(model) -> None:
    todo = list(batches(make_examples(7), 4, 0))
    naive = naive_replacement(model, todo)
    tracer = ModelTracer(model)
    tracer.run(todo)
    traced = tracer.statistics()
    assert ("replacement_trained" in traced) == tracer.moe.has_gate_scale
    for row, layer in enumerate(tracer.layers):
        for name in NAMES:
            (found,) = traced.get(name, traced["replacement"])[row]
            wrong = np.abs(found - naive[layer][name]) > 1e-5 * naive[layer]["size"]
            assert not wrong.any(), (layer, name)


def test_it_equals_routing_every_token_again(family: str) -> None:
    check(make_model(family))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_without_an_expert_left_to_choose_the_others_serve_alone(family: str) -> None:
    """E = k: B = A without i."""
    counts = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "glm4_moe": "n_routed_experts"}
    check(make_model(family, **{counts[family]: 4, "num_experts_per_tok": 4}))


def test_without_an_expert_left_in_the_chosen_groups_the_others_serve_alone() -> None:
    check(make_model("deepseek_v3", n_group=4, topk_group=2, n_routed_experts=16, num_experts_per_tok=8))


def test_top_1_leaves_the_next_choice_alone() -> None:
    check(make_model("qwen3_moe", num_experts_per_tok=1))


def without(trace: Trace, layer: int, expert: int) -> Selection:
    """All experts but one."""
    whole = whole_selection(trace.info.layers, trace.info.num_experts)
    layers = {**whole.layers, layer: [i for i in whole.layers[layer] if i != expert]}
    return replace(whole, layers=layers, routing="reroute", top_k=trace.info.top_k, family=trace.info.family)


@pytest.mark.parametrize("family", UNGROUPED)
@torch.no_grad()
def test_scores_are_what_masking_one_expert_changes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, on the layer's own inputs, for the tokens that were routed to the expert."""
    softmax = torch.nn.functional.softmax
    # routers round to float32, which hides small changes of large weights from who compares two forward passes
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim))
    model = make_model(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # grouped products know no float64
    examples = make_examples(6)
    trace = trace_model(model, examples, batch_size=6)
    weights = PredictingWeights()
    scores = score_trace(trace, "replacement", ScoreOptions(weights))
    batch = make_batch(examples, range(6), 0)
    factor = torch.tensor([0.25, 1.0, 0.25, 1.0], dtype=torch.float64)[batch.cells.clamp_min(0)]
    factor = torch.where(batch.cells >= 0, factor, 0)
    for row, (layer, seen) in enumerate(sorted(capture(model, batch).items())):
        block = moe_block(model.model.layers[layer])
        scale = getattr(model.model.layers[layer], "residual_multiplier", 1.0)

        def run(block=block, seen=seen):
            output = block(seen.hidden[None])
            return (output[0] if isinstance(output, tuple) else output)[0]

        dense, expected = run(), []
        for expert in range(trace.info.num_experts):
            with shape_moe.masked(model, without(trace, layer, expert)):
                change = (scale * (run() - dense)).square().sum(1) / seen.residual.square().sum(1)
            routed = (seen.ids == expert).any(1)
            expected.append(float((factor * change)[routed].sum()))
        np.testing.assert_allclose(scores.values[row], expected, rtol=1e-6, atol=0)


def test_experts_without_tokens_score_zero() -> None:
    trace = trace_model(make_model("qwen3_moe"), make_examples(1))
    scores = score_trace(trace, "replacement")
    assert (scores.activations == 0).any()
    assert ((scores.values > 0) == (scores.activations > 0)).all()


def test_the_trained_scale_is_its_own_scorer() -> None:
    """Where routers renormalise, both scales are one."""
    for family, differ in (("olmoe", True), ("qwen3_moe", False), ("glm4_moe", False)):
        trace = trace_model(make_model(family), make_examples(4))
        survivors, trained = (score_trace(trace, name).values for name in ("replacement", "replacement-trained"))
        assert np.array_equal(survivors, trained) is not differ


def test_ties_leave_exactly_one_next_choice() -> None:
    """The k + 1 best of equal scores need not hold the k best."""
    ids = torch.tensor([[0, 1], [4, 2]])
    wider = WiderChoice(torch.tensor([[0, 3, 2], [2, 4, 7]]), torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.4, 0.2]]))
    g = torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
    chosen, weights = next_ids_and_weights(ids, g, wider, renormalises=True)
    assert chosen.tolist() == [3, 7]
    np.testing.assert_allclose(weights, [0.25 / 0.75, 0.25], rtol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_routers_are_left_as_they_were(family: str) -> None:
    model = make_model(family)
    routers = [router_of(layer) for layer in model.model.layers if hasattr(moe_block(layer), "experts")]
    before = [router.top_k for router in routers]
    ModelTracer(model).run(batches(make_examples(3), 3, 0))
    assert [router.top_k for router in routers] == before


def test_it_can_be_left_out(embedded_model) -> None:
    model, tokenizer = embedded_model
    rows = [{"prompt": "a b", "response": "c d"}, {"prompt": "e f", "response": "g h"}]
    options = ExampleOptions(DataOptions.of(rows, samples=2), replacement=False)
    trace = shape_moe.trace(model, options, tokenizer=tokenizer)
    assert "replacement" not in trace.statistics
    assert "contribution_relative" in trace.statistics
    with pytest.raises(UsageError, match=r"'replacement' needs replacement \(.*--no-replacement\)"):
        score_trace(trace, "replacement")
