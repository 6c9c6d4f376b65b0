"""Quantised checkpoints of every method: sliced without loss, traced and pruned as the plain model is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config, Mxfp4Config

from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.architectures.tensor_names import renumbered
from shape_moe.calibration.records import DataOptions
from shape_moe.jobs.inspect import inspect_model
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.jobs.verify import verify
from shape_moe.progress import SILENT
from shape_moe.pruning.checkpoint import plan_checkpoint
from shape_moe.pruning.writers import writer_for
from support.data import write_lines
from support.fp8 import save_fp8_model
from support.mxfp4 import save_mxfp4_model
from support.quantised import METHODS, SIZES, pack_fp8, save_plain, save_quantised
from support.selections import random_selection
from support.tiny_models import make_model, save_model

RUN_WHOLE = ("fp8_block", "awq", "gptq_act", "compressed_int4", "modelopt_nvfp4", "bitsandbytes", "mlx_4")
"""One checkpoint of each module goes the whole way; the others differ in what single tensors stand for."""


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, embedded):
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("quantised") / name
            made[name] = (folder, save_quantised(folder, name))
            AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("routing", "counts"), [("drop", "ragged"), ("reroute", "equal")])
def test_a_slice_is_the_slice_of_the_plain_tensors(quantised, tmp_path, name, routing, counts) -> None:
    """Every part of a kept expert moves with it: what the parts stand for is the same, bit for bit."""
    source = open_snapshot(quantised(name)[0])
    selection = random_selection(source, routing, counts)
    target = "ragged" if counts == "ragged" else "stock"
    (tmp_path / "out").mkdir()
    writer_for(source, target).write(source, selection, tmp_path / "out", SILENT)
    pruned = open_snapshot(tmp_path / "out")
    expected = {}
    for key, tensor in source.plain.items():
        role = source.role(key)
        kept = selection.layers.get(role.layer)
        values = tensor.values()
        if role.role == "expert":
            if role.expert in kept:
                expected[renumbered(source.moe.family, key, kept.index(role.expert))] = values
        elif role.role == "router" and routing == "reroute":
            expected[key] = values[list(kept)]
        else:
            expected[key] = values
    assert set(pruned.plain) == set(expected)
    for key, tensor in pruned.plain.items():
        assert torch.equal(tensor.values(), expected[key]), key
    assert pruned.total_bytes == sum(plan.size for plan in plan_checkpoint(source, selection))


@pytest.mark.parametrize(
    ("save", "settings"),
    [(save_fp8_model, FineGrainedFP8Config(dequantize=True)), (save_mxfp4_model, Mxfp4Config(dequantize=True))],
)
def test_transformers_itself_loads_slices_of_what_it_reads(tmp_path, save, settings) -> None:
    source = open_snapshot(save(tmp_path / "model"))
    selection = random_selection(source, "reroute", "equal")
    (tmp_path / "out").mkdir()
    writer_for(source, "stock").write(source, selection, tmp_path / "out", SILENT)
    options = {"quantization_config": settings, "dtype": torch.bfloat16, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert not info["missing_keys"]
    own = load_model(open_snapshot(tmp_path / "out"), device="cpu")
    assert all(torch.equal(tensor, own.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", RUN_WHOLE)
def test_traces_and_answers_are_those_of_the_plain_model(quantised, tmp_path, name) -> None:
    folder, plain = quantised(name)
    whole = save_plain(tmp_path / "plain", plain)
    AutoTokenizer.from_pretrained(folder).save_pretrained(whole)
    records = [{"text": "".join(chr(33 + (7 * i + j) % 90) for j in range(9))} for i in range(5)]
    data = DataOptions.of(str(write_lines(tmp_path / "data.jsonl", records)), samples=5)
    options = ExampleOptions(data, device="cpu", dtype="float32")
    found, expected = trace(folder, options), trace(whole, options)
    assert set(found.statistics) == set(expected.statistics)
    for statistic, values in expected.statistics.items():
        assert (found.statistics[statistic] == values).all(), statistic
    for layer, table in expected.coalitions.items():
        assert (found.coalitions[layer].members == table.members).all()
        assert (found.coalitions[layer].counts == table.counts).all()

    source = open_snapshot(folder)
    selection = random_selection(source, "reroute", "ragged")
    result = prune(folder, tmp_path / "out", PruneOptions(device="cpu", dtype="float32"), selection=selection)
    assert result.logits.passed
    checks = verify(tmp_path / "out", original=folder, device="cpu", dtype="float32")
    assert [check.detail for check in checks if not check.passed] == []
    assert inspect_model(folder).snapshot.quantisation.label == source.quantisation.label


@pytest.mark.parametrize("scale", ["_scale_inv", "_scale"])
def test_stacked_fp8_experts(tmp_path, scale) -> None:
    """All experts of a layer in one tensor, as Transformers keeps them: one scale per block, or one per expert."""
    folder, generator = tmp_path / "model", torch.Generator().manual_seed(0)
    save_model(make_model("qwen3_moe", **SIZES), folder, save_original_format=False)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if ".experts." in key]:
        pack = pack_fp8(scale, (24, 20) if scale == "_scale_inv" else None)
        made = [pack(tuple(tensors[key].shape[1:]), generator) for _ in range(SIZES["num_experts"])]
        parts = {part: torch.stack([parts[part] for parts, _ in made]) for part in made[0][0]}
        tensors |= {key + part.removeprefix(".weight"): stack for part, stack in parts.items()}
        expected[key] = torch.stack([plain for _, plain in made])
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [24, 20] if scale == "_scale_inv" else None}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    source = open_snapshot(folder)
    assert all(torch.equal(source.plain[key].values(), values) for key, values in expected.items())
    state = load_model(source, device="cpu", dtype="float32").state_dict()
    assert all(torch.equal(state[key], values) for key, values in expected.items())
    selection = random_selection(source, "drop", "ragged")
    (tmp_path / "out").mkdir()
    writer_for(source, "ragged").write(source, selection, tmp_path / "out", SILENT)
    pruned = open_snapshot(tmp_path / "out").plain
    for key, values in expected.items():
        assert torch.equal(pruned[key].values(), values[selection.layers[source.role(key).layer]])
