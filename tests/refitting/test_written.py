"""Refitted weights in written checkpoints: loaded again, they are the refitted mask; all else is the original's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shape_moe
from shape_moe.architectures.live_layers import LiveLayers
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.architectures.tensor_names import down_projection
from shape_moe.calibration.batches import batches
from shape_moe.errors import CheckpointError, UnsupportedModelError
from shape_moe.progress import SILENT
from shape_moe.pruning.checkpoint import plan_checkpoint
from shape_moe.pruning.compare import compare_shard
from shape_moe.pruning.refitted_tensors import (
    check_refittable,
    read_refit_file,
    stored_dtype,
    why_not_refittable,
)
from shape_moe.pruning.writers import SafetensorsFolder
from shape_moe.refitting.layers import RefitPass, RefitRequest
from shape_moe.selection.selection import load_selection
from support.closeness import FLOAT32, relative_error
from support.data import make_examples
from support.fp8 import save_fp8_model
from support.mxfp4 import save_mxfp4_model
from support.selections import random_selection
from support.tiny_models import make_model, random_tokens, save_model


def refitted(model, selection, **request):
    engine = LiveLayers(model)
    with engine.attached():
        return RefitPass(engine, selection, list(batches(make_examples(24), 5, 0)), RefitRequest(**request)).run()


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def tensors_of(folder) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def write(source, selection, out, target="ragged"):
    out.mkdir()
    (out / "shape").mkdir()
    SafetensorsFolder(target).write(open_snapshot(source), selection, out, SILENT)
    selection.save(out / "shape" / "selection.json")
    return out


@pytest.mark.parametrize(("routing", "target"), [("drop", "ragged"), ("reroute", "ragged"), ("reroute", "stock")])
def test_reloaded_logits_equal_the_refitted_mask(family, checkpoint, tmp_path, routing, target) -> None:
    source = checkpoint(family)
    plain = random_selection(open_snapshot(source), routing, "equal" if target == "stock" else "ragged")
    model = make_model(family)
    selection = refitted(model, plain, rho=3.0).applied_to(plain)
    assert selection.weights
    out = write(source, selection, tmp_path / "out", target)
    pruned = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = random_tokens(3, 24)
    with shape_moe.masked(model, plain):
        unrepaired = logits_of(model, tokens)
    with shape_moe.masked(model, selection):
        expected = logits_of(model, tokens)
    assert relative_error(unrepaired, expected) > 100 * FLOAT32, "the refit must matter"
    assert relative_error(logits_of(pruned, tokens), expected) <= FLOAT32
    unrefitted = tensors_of(write(source, plain, tmp_path / "plain", target))
    found, facts = tensors_of(out), open_snapshot(source).moe.family
    assert list(found) == list(unrefitted)
    for name, tensor in found.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        is_new = down_projection(facts, name) is not None and int(layer) in selection.weights
        if not is_new:
            assert torch.equal(tensor, unrefitted[name]), name
    named = json.loads((out / "shape" / "refit.json").read_text())["tensors"]
    assert set(named) == {n for n in found if down_projection(facts, n) and int(n.split(".")[2]) in selection.weights}


def test_the_sources_dtype_is_kept_and_values_are_those_that_were_judged(tmp_path) -> None:
    source = save_model(make_model("mixtral", dtype=torch.bfloat16), tmp_path / "source")
    plain = random_selection(open_snapshot(source), "reroute", "ragged")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    assert stored_dtype(open_snapshot(source)) == torch.bfloat16
    selection = refitted(model, plain, rho=3.0, stored=torch.bfloat16).applied_to(plain)
    found = tensors_of(write(source, selection, tmp_path / "out"))
    layer, projections = next(iter(selection.weights.items()))
    for place in range(len(plain.layers[layer])):
        tensor = found[f"model.layers.{layer}.block_sparse_moe.experts.{place}.w2.weight"]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, projections.weight[place])


def test_the_live_layout_on_disk_is_refitted_too(tmp_path) -> None:
    source = save_model(make_model("mixtral"), tmp_path / "source", save_original_format=False)
    plain = random_selection(open_snapshot(source), "drop", "ragged")
    model = make_model("mixtral")
    selection = refitted(model, plain, rho=3.0).applied_to(plain)
    out = write(source, selection, tmp_path / "out")
    tokens = random_tokens(2, 20)
    with shape_moe.masked(model, selection):
        expected = logits_of(model, tokens)
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(out).eval(), tokens), expected) <= FLOAT32


def refitted_checkpoint(checkpoint, tmp_path):
    source = checkpoint("qwen2_moe")
    plain = random_selection(open_snapshot(source), "drop", "ragged")
    selection = refitted(make_model("qwen2_moe"), plain, rho=3.0).applied_to(plain)
    return source, write(source, selection, tmp_path / "out")


def compare(source, out) -> None:
    snapshot, selection = open_snapshot(source), load_selection(out)
    new = read_refit_file(out, selection, snapshot.moe.family)
    assert new
    for plan in plan_checkpoint(snapshot, selection, new):
        compare_shard(plan, out / plan.file_name)


@pytest.mark.parametrize("part", ["down_proj", "up_proj", "q_proj"])
def test_any_changed_byte_is_found(checkpoint, tmp_path, part) -> None:
    source, out = refitted_checkpoint(checkpoint, tmp_path)
    compare(source, out)
    (file,) = out.glob("*.safetensors")
    slot = next(slot for name, slot in open_snapshot(out).tensors.items() if part in name and "layers.0" in name)
    content = bytearray(file.read_bytes())
    content[slot.start + slot.size // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=part):
        compare(source, out)


def test_a_refit_file_that_excuses_other_tensors_is_refused(checkpoint, tmp_path) -> None:
    source, out = refitted_checkpoint(checkpoint, tmp_path)
    file = out / "shape" / "refit.json"
    document = json.loads(file.read_text())
    document["tensors"]["model.layers.0.mlp.experts.0.up_proj.weight"] = "0" * 64
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj\.weight, which is no down projection"):
        compare(source, out)
    file.unlink()
    with pytest.raises(CheckpointError, match="refit.json is missing"):
        compare(source, out)


@pytest.mark.parametrize(("save", "label"), [(save_mxfp4_model, "MXFP4"), (save_fp8_model, "FP8")])
def test_quantised_sources_are_refused_by_the_methods_name(tmp_path, save, label) -> None:
    snapshot = open_snapshot(save(tmp_path / "source"))
    reason = why_not_refittable(snapshot)
    assert reason is not None
    assert label in reason
    with pytest.raises(UnsupportedModelError, match="dequantise the model first"):
        check_refittable(snapshot)
    assert why_not_refittable(open_snapshot(save_model(make_model("olmoe"), tmp_path / "plain"))) is None
