"""Written checkpoints of every family, in both routings, ragged and equal: loaded again, they are the masked model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, ShapeMoeError, UnsupportedModelError, UsageError
from shape_moe.pruning import checkpoint as slicer
from shape_moe.pruning.checkpoint import check_fits, plan_checkpoint, write_index, write_shard
from shape_moe.pruning.compare import compare_shard
from shape_moe.pruning.masks import masked
from shape_moe.pruning.model_config import pruned_config
from support.closeness import FLOAT32, relative_error
from support.fp8 import save_fp8_model
from support.mxfp4 import save_mxfp4_model
from support.selections import random_selection
from support.tiny_models import GROUPED, make_model, moe_block, random_tokens, save_model

ROUTINGS = ("drop", "reroute")
KINDS = ("ragged", "equal")


def write(source: Path, selection, out: Path, target: str = "ragged") -> Path:
    """Slice a checkpoint as the job does, without its extras."""
    snapshot = open_snapshot(source)
    out.mkdir()
    plans = plan_checkpoint(snapshot, selection)
    for plan in plans:
        compare_shard(plan, write_shard(plan, out))
    write_index(plans, out)
    config = pruned_config(snapshot.config, snapshot.moe, selection, target)
    (out / "config.json").write_text(json.dumps(config))
    return out


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_reloaded_logits_equal_the_masked_original(family, checkpoint, tmp_path, routing, kind) -> None:
    source = checkpoint(family)
    selection = random_selection(open_snapshot(source), routing, kind)
    pruned = AutoModelForCausalLM.from_pretrained(write(source, selection, tmp_path / "out")).eval()
    original = make_model(family)
    tokens = random_tokens(3, 24)
    dense = logits_of(original, tokens)
    with masked(original, selection):
        expected = logits_of(original, tokens)
    assert (expected - dense).abs().max() > 0.05, "the selection must matter"
    for implementation in ("grouped_mm", "eager", "batched_mm"):
        pruned.set_experts_implementation(implementation)
        assert relative_error(logits_of(pruned, tokens), expected) <= FLOAT32
    assert torch.equal(logits_of(original, tokens), dense)
    counts = [
        moe_block(layer).experts.down_proj.shape[0]
        for layer in pruned.model.layers
        if hasattr(moe_block(layer), "experts")
    ]
    assert counts == [len(ids) for ids in selection.layers.values()]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_bfloat16_agrees(family, tmp_path, routing, record_property) -> None:
    source = save_model(make_model(family, dtype=torch.bfloat16), tmp_path / "source")
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    selection = random_selection(open_snapshot(source), routing, "ragged")
    pruned = AutoModelForCausalLM.from_pretrained(write(source, selection, tmp_path / "out")).eval()
    tokens = random_tokens(4, 24)
    with masked(original, selection):
        expected = logits_of(original, tokens)
    found = logits_of(pruned, tokens)
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    agreement = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    record_property("relative_error", error)
    record_property("top1_agreement", agreement)
    print(f"{family} {routing}: error {error:.2e} of the logits' RMS, top-1 agreement {agreement:.1%}")
    assert error <= 0.01
    assert agreement >= 0.99


def test_stock_checkpoints_need_no_package(family, checkpoint, tmp_path) -> None:
    source = checkpoint(family)
    selection = random_selection(open_snapshot(source), "reroute", "equal")
    out = write(source, selection, tmp_path / "out", target="stock")
    original = make_model(family)
    pruned = type(original).from_pretrained(out).eval()
    assert type(pruned) is type(original)
    tokens = random_tokens(2, 20)
    with masked(original, selection):
        assert relative_error(logits_of(pruned, tokens), logits_of(original, tokens)) <= FLOAT32
    config = json.loads((out / "config.json").read_text())
    assert "shape_pruning" not in config
    assert "auto_map" not in config


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("save", [save_mxfp4_model, save_fp8_model])
def test_quantised_experts_are_sliced_without_loss(tmp_path, routing, save) -> None:
    source = save(tmp_path / "source")
    snapshot = open_snapshot(source)
    selection = random_selection(snapshot, routing, "ragged")
    out = write(source, selection, tmp_path / "out")
    original, pruned = load_model(snapshot), load_model(open_snapshot(out))
    for layer, ids in selection.layers.items():
        whole, part = (moe_block(m.model.layers[layer]).experts for m in (original, pruned))
        assert torch.equal(whole.gate_up_proj[ids], part.gate_up_proj)
        assert torch.equal(whole.down_proj[ids], part.down_proj)
    tokens = random_tokens(2, 20)
    with masked(original, selection):
        expected = logits_of(original, tokens)
    error = (logits_of(pruned, tokens) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= 0.01


def test_saving_shards_and_packed_layouts(tmp_path) -> None:
    """Many small shards give the same tensors as one, and so does a checkpoint with packed experts."""
    model = make_model("qwen3_moe")
    layouts = {"one": {}, "many": {"max_shard_size": "20KB"}, "packed": {"save_original_format": False}}
    folders = {name: save_model(model, tmp_path / name, **options) for name, options in layouts.items()}
    assert len(list(folders["many"].glob("*.safetensors"))) > 3
    tokens = random_tokens(2, 12)
    results = []
    for name, folder in folders.items():
        selection = random_selection(open_snapshot(folder), "reroute", "ragged")
        out = write(folder, selection, tmp_path / f"{name}-out")
        assert ((out / "model.safetensors.index.json").exists()) == (name == "many")
        results.append(AutoModelForCausalLM.from_pretrained(out).eval())
    weights, logits = results[0].state_dict(), logits_of(results[0], tokens)
    for model in results[1:]:
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert relative_error(logits_of(model, tokens), logits) <= FLOAT32


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "deepseek_v3"])
def test_layouts_of_the_live_model(tmp_path, name, routing) -> None:
    """Checkpoints whose names and packing are those of the live model, not of the published files."""
    model, tokens = make_model(name), random_tokens(2, 12)
    folder = save_model(model, tmp_path / "native", save_original_format=False)
    snapshot = open_snapshot(folder)
    assert any(
        key.endswith("mlp.experts.gate_up_proj") or "_moe.experts.gate_up_proj" in key for key in snapshot.tensors
    )
    selection = random_selection(snapshot, routing, "ragged")
    pruned = load_model(open_snapshot(write(folder, selection, tmp_path / "out")))
    with masked(model, selection):
        expected = logits_of(model, tokens)
    assert relative_error(logits_of(pruned, tokens), expected) <= FLOAT32


def test_other_tensors_are_copied_bit_by_bit(checkpoint, tmp_path) -> None:
    source = checkpoint("deepseek_v3")
    snapshot = open_snapshot(source)
    selection = random_selection(snapshot, "drop", "ragged")
    out = write(source, selection, tmp_path / "out")
    with safe_open(source / "model.safetensors", "pt") as old, safe_open(out / "model.safetensors", "pt") as new:
        for name in new.keys():  # noqa: SIM118  # not a dictionary
            if snapshot.role(name).role != "expert":
                assert torch.equal(old.get_tensor(name), new.get_tensor(name))
        assert any("shared_experts" in name for name in new.keys())  # noqa: SIM118
        assert new.metadata() == {"format": "pt"}


def test_correction_biases_follow_the_router(checkpoint, tmp_path) -> None:
    source = checkpoint("deepseek_v3")
    selection = random_selection(open_snapshot(source), "reroute", "ragged")
    out = write(source, selection, tmp_path / "out")
    with safe_open(source / "model.safetensors", "pt") as old, safe_open(out / "model.safetensors", "pt") as new:
        for layer, ids in selection.layers.items():
            for part in ("weight", "e_score_correction_bias"):
                name = f"model.layers.{layer}.mlp.gate.{part}"
                assert torch.equal(old.get_tensor(name)[ids], new.get_tensor(name))


def test_multi_token_prediction_layers_are_left_behind(checkpoint, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(checkpoint("deepseek_v3"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    extra = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if ".layers.2." in n}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    snapshot = open_snapshot(source)
    assert snapshot.moe_layers == (1, 2)
    out = write(source, random_selection(snapshot, "drop", "ragged"), tmp_path / "out")
    assert not any(".layers.3." in name for name in open_snapshot(out).tensors)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("name", GROUPED)
def test_groups_must_stay_equal_to_reroute(checkpoint, name) -> None:
    snapshot = open_snapshot(checkpoint(name))
    selection = random_selection(snapshot, "drop", "ragged", seed=3)
    check_fits(snapshot, selection)
    from dataclasses import replace

    uneven = {layer: [0, 1, 2, 3, 4, 5, 8, 9, 12, 13] for layer in selection.layers}
    with pytest.raises(UsageError, match="different numbers of experts in its 4 router groups"):
        check_fits(snapshot, replace(selection, routing="reroute", layers=uneven))


def test_selections_of_other_models_are_refused(checkpoint) -> None:
    from dataclasses import replace

    snapshot = open_snapshot(checkpoint("qwen3_moe"))
    selection = random_selection(snapshot, "drop", "ragged")
    with pytest.raises(UsageError, match="32 experts per layer; the model has 16"):
        check_fits(snapshot, replace(selection, num_experts=32))
    with pytest.raises(UsageError, match="names layer 1, which is not an MoE layer"):
        check_fits(snapshot, replace(selection, layers={**selection.layers, 1: [0]}))
    with pytest.raises(UsageError, match="keeps 2 experts; routing reroute needs at least 4"):
        check_fits(snapshot, replace(selection, routing="reroute", layers={0: [0, 1], 2: [0, 1, 2, 3]}))


def test_comparison_notices_any_flipped_bit(checkpoint, tmp_path) -> None:
    snapshot = open_snapshot(checkpoint("olmoe"))
    (plan,) = plan_checkpoint(snapshot, random_selection(snapshot, "reroute", "ragged"))
    file = write_shard(plan, tmp_path)
    compare_shard(plan, file)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from the original"):
        compare_shard(plan, file)


def test_the_slow_copy_is_the_same(checkpoint, tmp_path, monkeypatch) -> None:
    snapshot = open_snapshot(checkpoint("gpt_oss"))
    (plan,) = plan_checkpoint(snapshot, random_selection(snapshot, "reroute", "ragged"))
    fast = write_shard(plan, tmp_path).read_bytes()
    monkeypatch.delattr(slicer.os, "copy_file_range", raising=False)
    (tmp_path / "slow").mkdir()
    assert write_shard(plan, tmp_path / "slow").read_bytes() == fast


def test_full_disks_are_named_and_leave_nothing(checkpoint, tmp_path, monkeypatch) -> None:
    import errno

    snapshot = open_snapshot(checkpoint("olmoe"))
    (plan,) = plan_checkpoint(snapshot, random_selection(snapshot, "drop", "equal"))

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slicer.os, "copy_file_range", full)
    with pytest.raises(ShapeMoeError, match="disk of .* is full.*run the same command again"):
        write_shard(plan, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_complete_shards_are_not_written_again(checkpoint, tmp_path, monkeypatch) -> None:
    snapshot = open_snapshot(checkpoint("olmoe"))
    (plan,) = plan_checkpoint(snapshot, random_selection(snapshot, "drop", "equal"))
    write_shard(plan, tmp_path)

    def never(*_args):
        raise AssertionError("written again")

    monkeypatch.setattr(slicer, "_copy_range", never)
    write_shard(plan, tmp_path)
    (tmp_path / plan.file_name).write_bytes(b"half")
    with pytest.raises(AssertionError, match="written again"):
        write_shard(plan, tmp_path)


def test_quantisation_lists_are_renumbered(checkpoint) -> None:
    snapshot = open_snapshot(checkpoint("qwen3_moe"))
    selection = random_selection(snapshot, "drop", "ragged")
    kept = selection.layers[0]
    dropped = next(i for i in range(16) if i not in kept)
    prefix = "model.layers.0.mlp.experts"
    names = ["lm_head", f"{prefix}.{kept[2]}.up_proj", f"{prefix}.{dropped}.up_proj", "model.layers.1.mlp.gate"]
    config = {**snapshot.config, "quantization_config": {"quant_method": "gptq", "ignore": names}}
    rewritten = pruned_config(config, snapshot.moe, selection, "ragged")["quantization_config"]["ignore"]
    assert rewritten == ["lm_head", f"{prefix}.2.up_proj", "model.layers.1.mlp.gate"]
    assert config["quantization_config"]["ignore"] == names
    config["quantization_config"]["ignore"] = [r"re:.*experts\.3\..*"]
    with pytest.raises(UnsupportedModelError, match="ignore names experts by"):
        pruned_config(config, snapshot.moe, selection, "ragged")


def test_router_losses_are_switched_off(checkpoint) -> None:
    """Transformers' balancing loss needs routers of one width, which rerouted ragged models do not have."""
    snapshot = open_snapshot(checkpoint("mixtral"))
    selection = random_selection(snapshot, "reroute", "ragged")
    config = pruned_config({**snapshot.config, "output_router_logits": True}, snapshot.moe, selection, "ragged")
    assert config["output_router_logits"] is False
