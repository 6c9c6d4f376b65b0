"""Gate scale trained: kept experts' weights as the softmax over all experts gives them, in masks and in checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shape_moe
from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.moe_config import check_gate_scale
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.verify import verify
from shape_moe.pruning.modeling_shape_moe import at_trained_scale
from shape_moe.pruning.surgery import prune_model
from shape_moe.selection.selection import Selection, load_selection, selection_of
from support.closeness import FLOAT32, relative_error
from support.selections import random_selection
from support.tiny_models import make_model, moe_block, random_tokens, router_of

SCALED = ("qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v2_grouped")
TRAINED = "reroute, trained"


def brute_force(router, hidden: torch.Tensor, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of a router that chooses among kept experts, by the softmax over all of them, in float64."""
    logits = hidden.double().reshape(-1, hidden.shape[-1]) @ router.weight.double().T
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    ids = []
    for row in weights.tolist():
        allowed = list(kept)
        if getattr(router, "topk_method", "greedy") == "group_limited_greedy":
            size = len(row) // router.num_group
            best = sorted(range(router.num_group), key=lambda g: -max(row[i] for i in kept if i // size == g))
            allowed = [i for i in kept if i // size in best[: router.topk_group]]
        ids.append(sorted(allowed, key=lambda i: -row[i])[: router.top_k])
    chosen = torch.tensor(ids)
    return chosen, weights.gather(-1, chosen) * getattr(router, "routed_scaling_factor", 1.0)


def with_brute_force(model, selection: Selection):
    """The same model with routers that are the brute force."""
    for layer, kept in selection.layers.items():
        router = router_of(model.model.layers[layer])

        def forward(hidden, *, router=router, kept=kept):
            ids, weights = brute_force(router, hidden, kept)
            return None, weights.to(hidden.dtype), ids

        router.forward = forward
    return model


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@given(st.integers(0, 10**6), st.integers(2, 12), st.data())
def test_one_factor_per_token_makes_the_weights_those_of_all_experts(seed, experts, data) -> None:
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1))))
    logits = 6 * torch.randn(5, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = at_trained_scale(logits[:, kept].softmax(-1), logits, kept)
    assert relative_error(found, logits.softmax(-1)[:, kept]) <= 1e-14


@pytest.mark.parametrize("name", SCALED)
def test_experts_receive_what_the_softmax_over_all_gives(name, checkpoint) -> None:
    selection = random_selection(open_snapshot(checkpoint(name)), TRAINED, "ragged")
    model, seen, tokens = make_model(name), [], random_tokens(2, 16)
    for layer in selection.layers:
        block = moe_block(model.model.layers[layer])
        block.register_forward_pre_hook(lambda _m, args, layer=layer: seen.append([layer, args[0]]))
        block.experts.register_forward_pre_hook(lambda _m, args: seen[-1].extend(args[1:]))
    with shape_moe.masked(model, selection):
        logits_of(model, tokens)
    assert [entry[0] for entry in seen] == list(selection.layers)
    for layer, hidden, ids, weights in seen:
        router = router_of(model.model.layers[layer])
        expected, exact = brute_force(router, hidden, selection.layers[layer])
        rows = [dict(zip(*pair, strict=True)) for pair in zip(ids.tolist(), weights.tolist(), strict=True)]
        wanted = [dict(zip(*pair, strict=True)) for pair in zip(expected.tolist(), exact.tolist(), strict=True)]
        assert [row.keys() for row in rows] == [row.keys() for row in wanted]
        for row, want in zip(rows, wanted, strict=True):
            for expert, weight in want.items():
                assert row[expert] == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("name", SCALED)
def test_a_mask_is_the_masked_full_softmax_model(name, checkpoint) -> None:
    selection = random_selection(open_snapshot(checkpoint(name)), TRAINED, "ragged")
    model, tokens = make_model(name), random_tokens(2, 16)
    expected = logits_of(with_brute_force(make_model(name), selection), tokens)
    before = logits_of(model, tokens)
    with shape_moe.masked(model, selection):
        trained = logits_of(model, tokens)
    with shape_moe.masked(model, replace(selection, gate_scale="survivors")):
        survivors = logits_of(model, tokens)
    assert relative_error(trained, expected) <= FLOAT32
    assert relative_error(survivors, expected) > 100 * FLOAT32
    assert torch.equal(logits_of(model, tokens), before)


def test_weights_that_are_not_those_of_one_softmax_have_no_trained_scale() -> None:
    family = FAMILIES["phimoe"]
    check_gate_scale("survivors", family, renormalises=False)
    with pytest.raises(UsageError, match=r"\(phimoe\): .*one softmax"):
        check_gate_scale("trained", family, renormalises=False)
    check_gate_scale("trained", FAMILIES["olmoe"], renormalises=False)


def test_a_family_whose_configuration_turns_renormalising_off() -> None:
    changes = {"norm_topk_prob": False}
    model, tokens = make_model("qwen3_moe", **changes), random_tokens(2, 16)
    layers = {0: [0, 2, 3, 5, 9, 11], 2: [1, 4, 6, 7, 8, 15]}
    selection = Selection(None, None, None, "s", "uniform", "reroute", 16, 4, layers, 0.4, gate_scale="trained")
    expected = logits_of(with_brute_force(make_model("qwen3_moe", **changes), selection), tokens)
    with shape_moe.masked(model, selection):
        assert relative_error(logits_of(model, tokens), expected) <= FLOAT32
    with pytest.raises(UsageError, match="renormalise"), shape_moe.masked(make_model("qwen3_moe"), selection):
        pass


@pytest.mark.parametrize("name", SCALED)
def test_a_checkpoint_keeps_the_routers_and_is_the_masked_model(name, checkpoint, tmp_path) -> None:
    source = open_snapshot(checkpoint(name))
    selection = random_selection(source, TRAINED, "ragged")
    prune(checkpoint(name), tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=selection)
    tokens = random_tokens(2, 16)
    expected = logits_of(with_brute_force(make_model(name), selection), tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert relative_error(logits_of(loaded, tokens), expected) <= FLOAT32
    assert relative_error(logits_of(prune_model(make_model(name), selection), tokens), expected) <= FLOAT32
    old, new = load_file(checkpoint(name) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    routers = [key for key in new if key.endswith("mlp.gate.weight")]
    assert len(routers) == len(selection.layers)
    assert all(torch.equal(new[key], old[key]) for key in routers)
    description = json.loads((tmp_path / "out" / "config.json").read_text())["shape_pruning"]
    assert (description["version"], description["gate_scale"]) == (2, "trained")
    assert load_selection(tmp_path / "out").method.routed == TRAINED
    checks = verify(tmp_path / "out", original=checkpoint(name), device="cpu")
    assert [check.name for check in checks if check.passed is False and check.name != "tokenizer"] == []
    assert any(f"routing {TRAINED}" in check.detail for check in checks)


def test_generation_in_bfloat16_differs_by_rounding_alone(checkpoint, tmp_path) -> None:
    selection = random_selection(open_snapshot(checkpoint("olmoe")), TRAINED, "ragged")
    model, tokens = make_model("olmoe", dtype=torch.bfloat16), random_tokens(2, 16)
    cut = prune_model(make_model("olmoe", dtype=torch.bfloat16), selection)
    with shape_moe.masked(model, selection):
        assert relative_error(logits_of(cut, tokens), logits_of(model, tokens)) <= 0.05


def test_files_of_version_1_mean_survivors(checkpoint, tmp_path) -> None:
    """What version 1 wrote had neither entry."""
    selection = random_selection(open_snapshot(checkpoint("olmoe")), "reroute", "ragged")
    prune(checkpoint("olmoe"), tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=selection)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), random_tokens(2, 16))
    config_file, selection_file = tmp_path / "out" / "config.json", tmp_path / "out" / "shape" / "selection.json"
    config, document = json.loads(config_file.read_text()), json.loads(selection_file.read_text())
    assert (config["shape_pruning"]["version"], document["format_version"]) == (2, 2)
    config["shape_pruning"]["version"] = document["format_version"] = 1
    for part in (config["shape_pruning"], document):
        assert part.pop("gate_scale") == "survivors"
    config_file.write_text(json.dumps(config))
    selection_file.write_text(json.dumps(document))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits_of(old, random_tokens(2, 16)), expected)
    assert load_selection(tmp_path / "out") == load_selection(tmp_path / "out" / "shape" / "selection.json")
    assert load_selection(tmp_path / "out").gate_scale == "survivors"
    checks = {check.name: check.passed for check in verify(tmp_path / "out", device="cpu")}
    assert checks["selection and config"]
    assert checks["tensors"]


def test_selections_of_both_scales_are_told_apart(checkpoint, tmp_path) -> None:
    trained = random_selection(open_snapshot(checkpoint("olmoe")), TRAINED, "ragged")
    survivors = replace(trained, gate_scale="survivors")
    assert trained.digest != survivors.digest
    trained.save(tmp_path / "selection.json")
    assert load_selection(tmp_path / "selection.json") == trained
    for change in ({"routing": "drop"}, {"gate_scale": "other"}, {"constraints": {"target": "stock"}}):
        document = {**json.loads((tmp_path / "selection.json").read_text()), **change}
        with pytest.raises(CheckpointError, match="not a valid selection"):
            selection_of(document, tmp_path / "selection.json")
