"""Pruned GGUF files: the bytes of the kept experts, and metadata that fit them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from shape_moe.architectures.gguf_file import read_gguf
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.progress import SILENT
from shape_moe.pruning.gguf_slices import DIGEST_KEY, OWN_KEYS, SELECTION_KEY, compare_gguf, plan_gguf
from shape_moe.pruning.writers import writer_for
from shape_moe.selection.selection import Selection
from support.gguf_files import (
    ARCHITECTURE,
    gguf_model,
    matrices,
    metadata_of,
    random_blocks,
    save_gguf,
    to_gguf,
    write_gguf,
)
from support.selections import random_selection


def opened(file: Path) -> GgufModel:
    model = open_snapshot(file)
    assert isinstance(model, GgufModel)
    return model


def written(model: GgufModel, selection: Selection, folder: Path) -> Path:
    folder.mkdir()
    return writer_for(model, "stock").write(model, selection, folder, SILENT).path


def check_slices(original: Path, pruned: Path, selection: Selection) -> None:
    """Against the package's own reader: experts' rows as selected, all else as it was."""
    new = {tensor.name: tensor for tensor in gguf.GGUFReader(pruned).tensors}
    old = gguf.GGUFReader(original).tensors
    assert [tensor.name for tensor in old] == list(new)
    cut = 0
    for tensor in old:
        found, rows = new[tensor.name], slice(None)
        if "_exps" in tensor.name or ".ffn_gate_inp." in tensor.name or "exp_probs_b" in tensor.name:
            rows, cut = list(selection.layers[int(tensor.name.split(".")[1])]), cut + 1
        assert found.tensor_type == tensor.tensor_type
        assert np.array_equal(found.data, tensor.data[rows]), tensor.name
    assert cut >= 4 * len(selection.layers)


@pytest.mark.parametrize("family", ARCHITECTURE)
def test_rows_of_kept_experts_and_everything_else(family: str, tmp_path: Path) -> None:
    file = save_gguf(gguf_model(family), tmp_path / "m.gguf")
    before = file.read_bytes()
    model = opened(file)
    selection = random_selection(model, "reroute", "equal")
    pruned = written(model, selection, tmp_path / "out")
    check_slices(file, pruned, selection)
    assert file.read_bytes() == before
    assert opened(pruned).moe.num_experts == selection.equal_count


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K])
def test_quantised_blocks_are_copied(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    live = gguf_model("qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=256)
    if kind == GGMLQuantizationType.Q8_0:
        file = save_gguf(live, tmp_path / "m.gguf", matrices(kind))
    else:
        tensors, types = to_gguf(live), {}
        for seed, name in enumerate(name for name in tensors if "_exps" in name):
            tensors[name], types[name] = random_blocks(kind, tensors[name].shape, seed), kind
        file = write_gguf(tmp_path / "m.gguf", "qwen3moe", metadata_of(live.config), tensors, raw_types=types)
    model = opened(file)
    selection = random_selection(model, "reroute", "equal")
    pruned = written(model, selection, tmp_path / "out")
    check_slices(file, pruned, selection)
    down, kept = "model.layers.1.mlp.experts.down_proj.weight", list(selection.layers[1])
    values = model.values(model.tensors[down], "dequantised")[kept]
    assert np.array_equal(opened(pruned).values(opened(pruned).tensors[down], "dequantised"), values)


def test_scales_of_experts_follow(tmp_path: Path) -> None:
    live = gguf_model("qwen3_moe")
    scales = {f"blk.{layer}.ffn_up_exps.scale": np.arange(16, dtype=np.float32) + 1 for layer in range(3)}
    file = write_gguf(tmp_path / "m.gguf", "qwen3moe", metadata_of(live.config), {**to_gguf(live), **scales})
    model = opened(file)
    selection = random_selection(model, "reroute", "equal")
    check_slices(file, written(model, selection, tmp_path / "out"), selection)


def test_metadata_stay_but_for_what_counts_experts(tmp_path: Path) -> None:
    live = gguf_model("qwen3_moe")
    extra = {"general.license": "apache-2.0", "quantize.imatrix.file": "x.dat", "my.list": [3, 1, 2]}
    tensors, metadata = to_gguf(live), metadata_of(live.config)
    model = opened(write_gguf(tmp_path / "m.gguf", "qwen3moe", metadata, tensors, extra=extra))
    selection = random_selection(model, "reroute", "equal")
    found = read_gguf(written(model, selection, tmp_path / "out"))
    changed = {"qwen3moe.expert_count": 8, "general.name": "Tiny Model pruned to 8 of 16 experts"}
    routers = sum(values.size for name, values in tensors.items() if "ffn_gate_inp" in name) // 2
    shared = routers + sum(
        values.size for name, values in tensors.items() if "exps" not in name and "gate_inp" not in name
    )
    changed["general.size_label"] = f"8x{(shared + 3 * 3 * 32 * 24) / 1000:.0f}K"
    old = model.headers[0].entries
    assert [key for key in found.entries if key not in OWN_KEYS] == list(old)
    for key, entry in found.entries.items():
        if key in changed:
            assert (entry.value, entry.kind) == (changed[key], old[key].kind)
        elif key not in OWN_KEYS:
            assert entry.raw == old[key].raw
    told = json.loads(found.metadata[SELECTION_KEY])
    assert str(tmp_path) not in "".join(str(found.metadata[key]) for key in OWN_KEYS)
    assert {int(layer): tuple(ids) for layer, ids in told["layers"].items()} == {
        layer: tuple(ids) for layer, ids in selection.layers.items()
    }


def test_parts_become_one_file(tmp_path: Path) -> None:
    live = gguf_model("olmoe")
    tensors, whole = to_gguf(live), save_gguf(live, tmp_path / "whole.gguf")
    names = list(tensors)
    for number, part in enumerate((names[:9], names[9:])):
        extra = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        values = {name: tensors[name] for name in part}
        metadata = {} if number else metadata_of(live.config)
        file = tmp_path / f"m-{number + 1:05d}-of-00002.gguf"
        write_gguf(file, "olmoe", metadata, values, tokenizer=False, extra=extra)
    model = opened(tmp_path / "m-00001-of-00002.gguf")
    selection = random_selection(model, "reroute", "equal")
    pruned = written(model, selection, tmp_path / "out")
    check_slices(whole, pruned, selection)
    assert not any(key.startswith("split.") for key in read_gguf(pruned).entries)


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    live = gguf_model("glm4_moe")
    tensors, metadata = to_gguf(live), metadata_of(live.config)
    mtp = {name.replace("blk.2.", "blk.3."): values for name, values in tensors.items() if name.startswith("blk.2.")}
    mtp["blk.3.nextn.eh_proj.weight"] = np.zeros((32, 64), np.float32)
    metadata |= {"block_count": 4, "nextn_predict_layers": 1}
    model = opened(write_gguf(tmp_path / "m.gguf", "glm4moe", metadata, {**tensors, **mtp}))
    assert model.moe_layers == (1, 2)
    pruned = read_gguf(written(model, random_selection(model, "reroute", "equal"), tmp_path / "out"))
    assert pruned.tensors.keys() == tensors.keys()
    assert pruned.metadata["glm4moe.block_count"] == 3
    assert pruned.metadata["glm4moe.nextn_predict_layers"] == 0


def test_what_llama_cpp_cannot_load_is_refused(tmp_path: Path) -> None:
    model = opened(save_gguf(gguf_model("qwen3_moe"), tmp_path / "m.gguf"))
    equal = random_selection(model, "reroute", "equal")
    with pytest.raises(UsageError, match="different counts in different layers.*--target stock"):
        plan_gguf(model, random_selection(model, "reroute", "ragged"))
    with pytest.raises(UsageError, match="routing drop.*--target stock"):
        plan_gguf(model, replace(equal, routing="drop"))
    with pytest.raises(UsageError, match="use --target stock"):
        writer_for(model, "ragged")


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    model = opened(save_gguf(gguf_model("qwen3_moe"), tmp_path / "m.gguf"))
    selection = random_selection(model, "reroute", "equal")
    file, plan = written(model, selection, tmp_path / "out"), plan_gguf(model, selection)
    content = file.read_bytes()
    assert compare_gguf(plan, file)
    rng = np.random.default_rng(0)
    at = content.index(DIGEST_KEY.encode()) + len(DIGEST_KEY) + 12
    for position in [at + 20, *rng.integers(0, len(content), 40).tolist()]:
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        with pytest.raises(CheckpointError):
            compare_gguf(plan, file)
    for other in (content[:-1], content + b"\0"):
        file.write_bytes(other)
        with pytest.raises(CheckpointError):
            compare_gguf(plan, file)


def test_a_damaged_rest_of_an_interrupted_run_is_written_again(tmp_path: Path) -> None:
    model = opened(save_gguf(gguf_model("qwen3_moe"), tmp_path / "m.gguf"))
    selection = random_selection(model, "reroute", "equal")
    file = written(model, selection, tmp_path / "out")
    content = file.read_bytes()
    file.write_bytes(content[:-40] + bytes(40))
    again = writer_for(model, "stock").write(model, selection, tmp_path / "out", SILENT)
    assert again.path.read_bytes() == content
