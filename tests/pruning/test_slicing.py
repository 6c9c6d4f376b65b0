"""Every byte of a pruned checkpoint by brute force: whole tensors loaded, rows taken one by one, names put together."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.progress import SILENT
from shape_moe.pruning.checkpoint import _joined, _runs
from shape_moe.pruning.writers import SafetensorsFolder, writer_for
from support.selections import random_selection
from support.tiny_models import make_model, save_model

ROWS = (
    "mlp.gate.weight", "mlp.gate.e_score_correction_bias", "mlp.router.weight", "mlp.router.bias",
    "block_sparse_moe.gate.weight", "block_sparse_moe.router.layer.weight",
)  # fmt: skip
PACKED = (
    "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj", "mlp.experts.down_proj_bias",
    "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight",
)  # fmt: skip


def expected_tensors(tensors: dict[str, torch.Tensor], selection) -> dict[str, torch.Tensor]:
    """What must be in the pruned checkpoint, written as a reader of its documentation would."""
    result = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[:2] == ["model", "layers"] else None
        kept = selection.layers.get(layer)
        inside = ".".join(parts[3:])
        if kept is None:
            result[name] = tensor
        elif inside in PACKED or (inside in ROWS and selection.method.routed == "reroute"):
            result[name] = torch.stack([tensor[expert] for expert in kept])
        elif "experts" in parts and parts[parts.index("experts") + 1].isdecimal():
            place = parts.index("experts") + 1
            if int(parts[place]) in kept:
                parts[place] = str(sorted(kept).index(int(parts[place])))
                result[".".join(parts)] = tensor
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize("routing", ["drop", "reroute"])
def test_every_tensor_is_what_it_should_be(family, checkpoint, tmp_path, routing) -> None:
    source = open_snapshot(checkpoint(family))
    selection = random_selection(source, routing, "ragged", seed=5)
    writer = SafetensorsFolder("ragged")
    written = writer.write(source, selection, tmp_path, SILENT)
    found = load_file(tmp_path / "model.safetensors")
    expected = expected_tensors(load_file(checkpoint(family) / "model.safetensors"), selection)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert written.size == sum(t.numel() * t.element_size() for t in expected.values())
    assert writer.bytes_there(tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    if routing == "drop":
        assert writer.bytes_for(source, selection.kept) == written.size
    else:
        assert writer.bytes_for(source, selection.kept) >= written.size


def test_configurations_change_in_nothing_else(family, checkpoint, tmp_path) -> None:
    source = open_snapshot(checkpoint(family))
    for routing, kind, target in (("drop", "ragged", "ragged"), ("reroute", "equal", "stock")):
        selection = random_selection(source, routing, kind)
        folder = tmp_path / target
        folder.mkdir()
        writer_for(source, target).write(source, selection, folder, SILENT)
        config = json.loads((folder / "config.json").read_text())
        changed = {key for key in config | source.config if config.get(key) != source.config.get(key)}
        if family in ("deepseek_v3", "glm4_moe"):
            assert config["num_nextn_predict_layers"] == 0
            changed.discard("num_nextn_predict_layers")
        if target == "ragged":
            assert changed == {"architectures", "auto_map", "shape_pruning"}
            assert config["shape_pruning"]["layers"] == {str(layer): ids for layer, ids in selection.layers.items()}
            assert config["shape_pruning"]["routing"] == "drop"
            assert config["shape_pruning"]["num_experts"] == source.moe.num_experts
            assert (folder / "modeling_shape_moe.py").is_file()
        else:
            assert changed
            assert changed <= {"num_experts", "num_local_experts", "n_routed_experts"}
            assert {config[key] for key in changed} == {selection.equal_count}
            assert not (folder / "modeling_shape_moe.py").exists()


@given(st.sets(st.integers(0, 40), min_size=1))
def test_runs_are_the_ids_again(ids) -> None:
    ordered = sorted(ids)
    runs = list(_runs(ordered))
    assert [first + i for first, count in runs for i in range(count)] == ordered
    assert all(a + n < b for (a, n), (b, _) in pairwise(runs)), "runs are as long as they can be"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=8))
@settings(max_examples=200)
def test_joined_ranges_are_the_same_bytes(ranges) -> None:
    joined = list(_joined(ranges))
    assert [b for start, size in joined for b in range(start, start + size)] == [
        b for start, size in ranges for b in range(start, start + size)
    ]
    assert all(size > 0 for _, size in joined)


def test_files_beside_the_configuration_are_renumbered(checkpoint, tmp_path) -> None:
    """Servers read quantisation settings from there when config.json has none."""
    folder = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    name = "model.layers.0.mlp.experts.{}.up_proj"
    contents = {
        "hf_quant_config.json": {"quantization": {"exclude_modules": [name.format(7), "lm_head"]}},
        "quantize_config.json": {"bits": 4, "dynamic": {name.format(7): {"bits": 8}}},
        "quant_config.json": {"modules_to_not_convert": ["gate", name.format(7)]},
    }
    for file, content in contents.items():
        (folder / file).write_text(json.dumps(content))
    selection = random_selection(open_snapshot(folder), "drop", "ragged")
    out = prune(folder, tmp_path / "out", PruneOptions(device="cpu"), selection=selection).path
    kept = selection.layers[0]
    new = name.format(kept.index(7)) if 7 in kept else None
    names = [new] if new else []
    found = {file: json.loads((out / file).read_text()) for file in contents}
    assert found["hf_quant_config.json"] == {"quantization": {"exclude_modules": [*names, "lm_head"]}}
    assert found["quantize_config.json"] == {"bits": 4, "dynamic": {n: {"bits": 8} for n in names}}
    assert found["quant_config.json"] == {"modules_to_not_convert": ["gate", *names]}


def test_layers_left_out_are_said(checkpoint, tmp_path) -> None:
    """In the notes and in the card: servers draft tokens with multi-token-prediction layers."""
    folder = shutil.copytree(checkpoint("deepseek_v3"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    selection = random_selection(open_snapshot(folder), "drop", "ragged")
    result = prune(folder, tmp_path / "out", PruneOptions(device="cpu"), selection=selection)
    sentence = f"{len(extra)} tensors of multi-token-prediction layers are left out"
    assert sum(note.startswith(sentence) for note in result.notes) == 1
    assert sentence in " ".join((result.path / "README.md").read_text().split())
    assert result.logits is not None
    assert result.logits.passed


def test_quantised_models_that_cannot_be_observed_are_pruned_all_the_same(tmp_path) -> None:
    """By a selection or a trace of the unquantised model; what cannot be compared is said."""
    folder = save_model(make_model("qwen3_moe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    selection = random_selection(open_snapshot(folder), "drop", "ragged")
    result = prune(folder, tmp_path / "out", PruneOptions(device="cpu"), selection=selection)
    assert result.logits_skipped.startswith(f"the original was not loaded: {folder}: hqq is not known here; known are ")
    assert f"Logits were not compared: {result.logits_skipped}." in result.notes
