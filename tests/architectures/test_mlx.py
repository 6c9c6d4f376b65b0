"""MLX checkpoints of families that MLX lays out in its own way, and what MLX itself says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.progress import SILENT
from shape_moe.pruning.kept import Keeping
from shape_moe.pruning.writers import writer_for
from support.mlx import MLX_SIZES, save_mlx
from support.mxfp4 import save_mxfp4_model
from support.selections import random_selection
from support.tiny_models import make_model, random_tokens, save_model


@pytest.mark.parametrize("family", MLX_SIZES)
def test_plain_tensors_are_those_that_transformers_reads(family, tmp_path) -> None:
    plain = save_mlx(tmp_path / "model", family)
    source = open_snapshot(tmp_path / "model")
    assert set(source.plain) == set(plain)
    for key, tensor in source.plain.items():
        assert torch.equal(tensor.values(), plain[key]), key
        assert tensor.shape == plain[key].shape
    for layer in source.moe_layers:
        for tensor in source.plain_expert(layer, 3):
            whole = plain[tensor.name]
            assert torch.equal(tensor.values(), whole if ".experts.3." in tensor.name else whole[3])
    load_model(source, device="cpu", dtype="float32")


@pytest.mark.parametrize("family", MLX_SIZES)
def test_a_slice_is_the_slice_of_the_plain_tensors(family, tmp_path) -> None:
    save_mlx(tmp_path / "model", family)
    source = open_snapshot(tmp_path / "model")
    selection = random_selection(source, "reroute", "ragged")
    (tmp_path / "out").mkdir()
    writer_for(source, "ragged").write(source, selection, tmp_path / "out", SILENT)
    pruned = open_snapshot(tmp_path / "out").plain
    keeping = Keeping(source.moe.family, source.moe.num_layers, selection.layers, True)
    expected = {}
    for tensor in source.plain.values():
        if (found := keeping.tensor(tensor.name)) is not None:
            name, rows = found
            expected[name] = tensor.values() if rows is None else tensor.values()[list(rows)]
    assert set(pruned) == set(expected)
    assert all(torch.equal(tensor.values(), expected[name]) for name, tensor in pruned.items())


SIZES = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 264}
FAMILIES = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "olmoe": {},
    "mixtral": {},
    "glm4_moe": {"moe_intermediate_size": 64},
    "deepseek_v2": {"moe_intermediate_size": 64},
    "gpt_oss": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_made_it_and_answers_alike_whole_and_pruned(family, tmp_path, embedded) -> None:
    """Needs mlx, mlx-cpu and mlx-lm; MLX quantises the model, and loads what was pruned."""
    mlx_lm = pytest.importorskip("mlx_lm")
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    save = (
        save_mxfp4_model
        if family == "gpt_oss"
        else lambda folder, **sizes: save_model(make_model(family, **sizes), folder)
    )
    original = save(tmp_path / "original", **SIZES, **FAMILIES[family])
    AutoTokenizer.from_pretrained(embedded).save_pretrained(original)
    as_mlx_reads_it(original / "config.json", yarn=family == "deepseek_v2")
    options = {"quantize": True, "q_group_size": 32, "q_bits": 4, "dtype": "float32"}
    mlx_lm.convert(str(original), str(tmp_path / "mlx"), **options)
    source, tokens = open_snapshot(tmp_path / "mlx"), random_tokens(2, 12)
    (tmp_path / "pruned").mkdir()
    writer_for(source, "stock").write(source, random_selection(source, "reroute", "equal"), tmp_path / "pruned", SILENT)
    for folder in (tmp_path / "mlx", tmp_path / "pruned"):
        theirs, _ = mlx_lm.utils.load_model(Path(folder))
        expected = torch.tensor(theirs(mx.array(tokens.numpy())).astype(mx.float32).tolist())
        with torch.no_grad():
            found = load_model(open_snapshot(folder), device="cpu", dtype="float32")(tokens).logits
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def as_mlx_reads_it(file: Path, *, yarn: bool) -> None:
    """Write the settings of rotary embeddings where MLX looks for them; its DeepSeek wants to have some of YaRN."""
    config = json.loads(file.read_text())
    theta = config["rope_parameters"]["rope_theta"]
    scaling = {"type": "yarn", "factor": 1.0, "mscale_all_dim": 0, "original_max_position_embeddings": 128}
    rotary = {**scaling, "rope_type": "yarn"} if yarn else {"rope_type": "default"}
    entries = {"rope_theta": theta, "rope_scaling": scaling if yarn else None}
    entries["rope_parameters"] = {**rotary, "rope_theta": theta}
    defaults = {"partial_rotary_factor": 1.0, "rms_norm_eps": 1e-6}
    if "num_local_experts" in config:
        defaults["num_experts"] = config["num_local_experts"]
    file.write_text(json.dumps({**defaults, **config, **entries}))
