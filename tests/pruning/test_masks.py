"""Masks against their definitions, and the model given back as it was."""

from __future__ import annotations

import pytest
import torch

import shape_moe
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import UsageError
from support.closeness import FLOAT32, relative_error
from support.selections import random_selection
from support.tiny_models import make_model, moe_block, random_tokens, router_of

EVERY = [
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "mixtral",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v2_grouped",
    "deepseek_v3",
    "glm4_moe",
]


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def routers(model):
    for layer in model.model.layers:
        if hasattr(moe_block(layer), "experts"):
            yield router_of(layer)


@pytest.mark.parametrize("name", EVERY)
def test_drop_is_the_model_whose_pruned_experts_output_zero(name, checkpoint) -> None:
    selection = random_selection(open_snapshot(checkpoint(name)), "drop", "ragged")
    model, zeroed = make_model(name), make_model(name)
    with torch.no_grad():
        for layer, ids in selection.layers.items():
            experts = moe_block(zeroed.model.layers[layer]).experts
            dropped = [i for i in range(selection.num_experts) if i not in ids]
            experts.down_proj[dropped] = 0
            if experts.has_bias:
                experts.down_proj_bias[dropped] = 0
    tokens = random_tokens(2, 16)
    with shape_moe.masked(model, selection):
        assert relative_error(logits_of(model, tokens), logits_of(zeroed, tokens)) <= FLOAT32


@pytest.mark.parametrize("name", EVERY)
def test_reroute_never_routes_to_pruned_experts(name, checkpoint) -> None:
    """Every token gets different experts, and kept ones alone; which ones is compared with sliced routers elsewhere."""
    selection = random_selection(open_snapshot(checkpoint(name)), "reroute", "ragged")
    model = make_model(name)
    seen: list[tuple[int, torch.Tensor]] = []
    for layer in selection.layers:
        moe_block(model.model.layers[layer]).experts.register_forward_pre_hook(
            lambda _m, args, layer=layer: seen.append((layer, args[1]))
        )
    with shape_moe.masked(model, selection):
        logits_of(model, random_tokens(2, 16))
    assert {layer for layer, _ in seen} == set(selection.layers)
    for layer, ids in seen:
        assert set(ids.flatten().tolist()) <= set(selection.layers[layer])
        assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v2"])
def test_reroute_equals_logits_of_minus_infinity(name, checkpoint) -> None:
    """For softmax routers without groups, leaving the router is the same as a logit of minus infinity."""
    selection = random_selection(open_snapshot(checkpoint(name)), "reroute", "ragged")
    model, reference = make_model(name), make_model(name)
    for layer, ids in selection.layers.items():
        router = router_of(reference.model.layers[layer])
        dead = torch.tensor([i for i in range(selection.num_experts) if i not in ids])
        _mask_logits(router, dead)
    tokens = random_tokens(2, 16)
    with shape_moe.masked(model, selection):
        found = logits_of(model, tokens)
    assert relative_error(found, logits_of(reference, tokens)) <= FLOAT32


def _mask_logits(router, dead):
    """Make a router see minus infinity for dead experts, through the linear map that it calls."""
    original = router.forward

    def forward(hidden_states):
        real = torch.nn.functional.linear

        def linear(value, weight, bias=None):
            logits = real(value, weight, bias)
            logits[..., dead] = float("-inf")
            return logits

        torch.nn.functional.linear = linear
        try:
            return original(hidden_states)
        finally:
            torch.nn.functional.linear = real

    router.forward = forward


@pytest.mark.parametrize("routing", ["drop", "reroute"])
def test_the_model_is_given_back(routing, checkpoint) -> None:
    model = make_model("deepseek_v3")
    selection = random_selection(open_snapshot(checkpoint("deepseek_v3")), "reroute", "equal")
    tokens = random_tokens(2, 16)
    before = logits_of(model, tokens)
    attributes = [dict(router.__dict__) for router in routers(model)]
    with pytest.raises(RuntimeError, match="stop"), shape_moe.masked(model, selection, routing):
        assert not torch.equal(logits_of(model, tokens), before)
        raise RuntimeError("stop")
    assert torch.equal(logits_of(model, tokens), before)
    for router, old in zip(routers(model), attributes, strict=True):
        assert router.__dict__.keys() == old.keys()
        assert router.num_experts == 16


def test_layers_that_are_not_named_keep_everything(checkpoint) -> None:
    from dataclasses import replace

    model = make_model("olmoe")
    selection = random_selection(open_snapshot(checkpoint("olmoe")), "drop", "ragged")
    everything = replace(selection, layers={1: list(range(16))})
    tokens = random_tokens(2, 16)
    before = logits_of(model, tokens)
    with shape_moe.masked(model, everything):
        assert torch.equal(logits_of(model, tokens), before)


def test_masks_work_on_offloaded_models(checkpoint, tmp_path) -> None:
    """accelerate brings offloaded weights in for one forward at a time; a mask must see those."""
    from accelerate import cpu_offload

    selection = random_selection(open_snapshot(checkpoint("deepseek_v3")), "reroute", "equal")
    model, offloaded = make_model("deepseek_v3"), make_model("deepseek_v3")
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    tokens = random_tokens(2, 12)
    for routing in ("drop", "reroute"):
        with shape_moe.masked(model, selection, routing), shape_moe.masked(offloaded, selection, routing):
            assert torch.equal(logits_of(model, tokens), logits_of(offloaded, tokens))
    assert torch.equal(logits_of(model, tokens), logits_of(offloaded, tokens))


def test_selections_of_other_models_are_refused(checkpoint) -> None:
    from dataclasses import replace

    selection = random_selection(open_snapshot(checkpoint("olmoe")), "drop", "ragged")
    with (
        pytest.raises(UsageError, match="for 16 experts per layer; the model has 8"),
        shape_moe.masked(make_model("mixtral"), selection),
    ):
        pass
    wrong = replace(selection, layers={**selection.layers, 7: [0]})
    with pytest.raises(UsageError, match="layer 7"), shape_moe.masked(make_model("olmoe"), wrong):
        pass
    with pytest.raises(UsageError, match="must be drop or reroute, not 'rerout'"):
        shape_moe.masked(make_model("olmoe"), selection, "rerout").__enter__()
    few = replace(selection, layers={layer: [3] for layer in selection.layers})
    with pytest.raises(UsageError, match="keeps 1 experts; routing reroute needs at least"):
        shape_moe.masked(make_model("olmoe"), few, "reroute").__enter__()
    with shape_moe.masked(make_model("olmoe"), few, "drop"):
        pass


def test_generation_under_a_mask(checkpoint) -> None:
    model = make_model("qwen3_moe")
    selection = random_selection(open_snapshot(checkpoint("qwen3_moe")), "drop", "ragged")
    tokens = random_tokens(1, 6)
    with shape_moe.masked(model, selection):
        cached = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
        full = tokens
        for _ in range(8):
            full = torch.cat([full, logits_of(model, full)[:, -1:].argmax(-1)], dim=1)
    assert cached.tolist() == full.tolist()
