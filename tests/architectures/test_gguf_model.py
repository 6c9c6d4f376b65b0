"""Models in GGUF files are the models that they were made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from shape_moe.architectures.gguf_architectures import ARCHITECTURES
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.loading import load_model, loaded_bytes
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, UnsupportedModelError
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
from support.tiny_models import random_tokens

FAMILIES = tuple(ARCHITECTURE)
BLOCKS = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}


def opened(file: Path) -> GgufModel:
    snapshot = open_snapshot(file)
    assert isinstance(snapshot, GgufModel)
    return snapshot


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(2, 24)).logits


def test_every_architecture_of_the_table_is_tested() -> None:
    assert {ARCHITECTURES[name].family for name in ARCHITECTURES} <= set(FAMILIES)
    assert set(ARCHITECTURE.values()) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_gives_the_original_logits(family: str, tmp_path: Path) -> None:
    original = gguf_model(family)
    snapshot = opened(save_gguf(original, tmp_path / "model.gguf"))
    found, expected = logits(load_model(snapshot, device="cpu")), logits(original)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_the_original_one(family: str, tmp_path: Path) -> None:
    original = gguf_model(family).config
    snapshot = opened(save_gguf(gguf_model(family), tmp_path / "model.gguf"))
    for key, value in snapshot.config.items():
        if key not in ("rope_parameters", "dtype") and value is not None:
            assert value == pytest.approx(getattr(original, key)), key
    assert snapshot.config["rope_parameters"]["rope_theta"] == original.rope_parameters["rope_theta"]
    sparse = [layer for layer in range(3) if f"blk.{layer}.ffn_gate_inp.weight" in snapshot.headers[0].tensors]
    assert snapshot.moe_layers == tuple(sparse)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_quantised_values_are_the_dequantised_model(family: str, tmp_path: Path) -> None:
    sizes = {key: value for key, value in BLOCKS.items() if key != "moe_intermediate_size" or family == "qwen3_moe"}
    original = gguf_model(family, head_dim=16, **sizes)
    file = save_gguf(original, tmp_path / "model.gguf", matrices(GGMLQuantizationType.Q8_0))
    snapshot = opened(file)
    assert {slot.dtype for slot in snapshot.tensors.values()} == {"F32", "Q8_0"}
    rounded = to_gguf(original)
    for tensor in gguf.GGUFReader(file).tensors:
        rounded[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            (*tensor.data.shape[:-1], -1)
        )
    plain = write_gguf(tmp_path / "plain.gguf", ARCHITECTURE[family], metadata_of(original.config), rounded)
    found = load_model(snapshot, device="cpu", dtype="float32")
    expected = load_model(opened(plain), device="cpu")
    assert snapshot.config["dtype"] == "bfloat16"
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert not torch.equal(logits(found), logits(original))


def test_layers_experts_and_rows(tmp_path: Path) -> None:
    original = gguf_model("qwen3_moe")
    snapshot = opened(save_gguf(original, tmp_path / "model.gguf"))
    experts = original.model.layers[1].mlp.experts
    gate, up, down = snapshot.expert(1, 5)
    assert [slot.name.rsplit(".", 2)[1] for slot in (gate, up, down)] == ["gate_proj", "up_proj", "down_proj"]
    joined = torch.cat([snapshot.values(gate, "dequantised"), snapshot.values(up, "dequantised")])
    assert torch.equal(joined, experts.gate_up_proj[5])
    assert torch.equal(snapshot.values(down, "dequantised"), experts.down_proj[5])
    assert snapshot.values(down).numpy().tobytes() == down.read() == experts.down_proj[5].detach().numpy().tobytes()
    state = {name: tensor.values() for name, tensor in snapshot.plain.items()}
    assert {name for name in state if ".layers.1." in name} == set(snapshot.live_names(1))
    assert state.keys() == original.state_dict().keys()
    assert (
        sum(slot.size for slot in snapshot.layer(1))
        + sum(slot.size for layer in (-1, 0, 2) for slot in snapshot.layer(layer))
        == snapshot.total_bytes
    )


def test_the_rows_of_the_router_and_experts_are_first(tmp_path: Path) -> None:
    snapshot = opened(save_gguf(gguf_model("glm4_moe"), tmp_path / "model.gguf"))
    rows = {name.split("layers.2.")[1]: snapshot.role(name).role for name in snapshot.tensors if "layers.2." in name}
    assert {name for name, role in rows.items() if role == "router"} == {
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
    }
    assert {name for name, role in rows.items() if role == "packed"} == {
        f"mlp.experts.{part}_proj.weight" for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_experts_are_those_of_the_live_model(family: str, tmp_path: Path) -> None:
    original = gguf_model(family)
    snapshot = opened(save_gguf(original, tmp_path / "model.gguf"))
    state = original.state_dict()
    for layer in snapshot.moe_layers:
        whole = {tensor.name: tensor for tensor in snapshot.plain_layer(layer)}
        assert whole.keys() == {name for name in state if f".layers.{layer}." in name}
        for tensor in snapshot.plain_expert(layer, 5):
            assert torch.equal(tensor.values(), state[tensor.name][5])
            assert tensor.count == state[tensor.name][5].numel()
    assert loaded_bytes(snapshot, "float32") == 4 * sum(tensor.numel() for tensor in state.values())


def test_experts_own_scales_multiply_their_weights(tmp_path: Path) -> None:
    original = gguf_model("qwen3_moe")
    tensors = to_gguf(original)
    scale = np.linspace(0.5, 2.0, 16, dtype=np.float32)
    tensors |= {f"blk.1.ffn_{part}_exps.scale": scale for part in ("gate", "up", "down")}
    snapshot = opened(write_gguf(tmp_path / "m.gguf", "qwen3moe", metadata_of(original.config), tensors))
    assert snapshot.role("model.layers.1.mlp.experts.up_proj.scale").role == "packed"
    live = "model.layers.1.mlp.experts.down_proj"
    expected = original.model.layers[1].mlp.experts.down_proj.detach() * torch.from_numpy(scale)[:, None, None]
    assert torch.equal(snapshot.plain[live].values(), expected)


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    original = gguf_model("olmoe")
    tensors = to_gguf(original)
    names = sorted(tensors)
    parts = [names[:10], names[10:17], names[17:]]
    for number, part in enumerate(parts):
        extra = {"split.no": number, "split.count": 3, "split.tensors.count": len(names)}
        values = {name: tensors[name] for name in part}
        writer_tokens = number == 0 and "token_embd.weight" in values
        write_gguf(
            tmp_path / f"m-{number + 1:05d}-of-00003.gguf",
            "olmoe",
            metadata_of(original.config) if number == 0 else {},
            values,
            tokenizer=writer_tokens,
            extra=extra,
        )
    snapshot = opened(tmp_path / "m-00002-of-00003.gguf")
    assert snapshot.path == tmp_path / "m-00001-of-00003.gguf"
    assert len(snapshot.tensors) == len(names)
    assert torch.equal(logits(load_model(snapshot, device="cpu")), logits(original))
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match="m-00003-of-00003.gguf is missing"):
        open_snapshot(tmp_path / "m-00001-of-00003.gguf")


def test_what_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    model = gguf_model("qwen3_moe")
    metadata, tensors = metadata_of(model.config), to_gguf(model)
    with pytest.raises(UnsupportedModelError, match="'grok'.*qwen3moe"):
        open_snapshot(write_gguf(tmp_path / "a.gguf", "grok", metadata, tensors))
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        open_snapshot(write_gguf(tmp_path / "b.gguf", "qwen3moe", {**metadata, "expert_count": 0}, tensors))
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.attn_qkv\.weight is not known"):
        extra = {**tensors, "blk.1.attn_qkv.weight": np.zeros((4, 4), np.float32)}
        open_snapshot(write_gguf(tmp_path / "c.gguf", "qwen3moe", metadata, extra))
    with pytest.raises(UnsupportedModelError, match="'longrope'"):
        scaled = {**metadata, "rope.scaling.type": "longrope"}
        open_snapshot(write_gguf(tmp_path / "d.gguf", "qwen3moe", scaled, tensors))
    with pytest.raises(UnsupportedModelError, match="differs between layers"):
        open_snapshot(
            write_gguf(tmp_path / "e.gguf", "qwen3moe", {**metadata, "expert_used_count": [2, 4, 4]}, tensors)
        )
    (tmp_path / "f.gguf").write_text("no")
    with pytest.raises(CheckpointError, match="named like a GGUF file but is not one"):
        open_snapshot(tmp_path / "f.gguf")


def test_a_type_that_cannot_be_dequantised_is_copied_and_not_computed_with(tmp_path: Path) -> None:
    model = gguf_model("qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=256)
    tensors = to_gguf(model)
    name = "blk.1.ffn_down_exps.weight"
    kind = GGMLQuantizationType.Q8_K
    tensors[name] = np.zeros((16, 256, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    file = write_gguf(tmp_path / "m.gguf", "qwen3moe", metadata_of(model.config), tensors, raw_types={name: kind})
    snapshot = opened(file)
    assert snapshot.forms == {"raw"}
    with pytest.raises(UnsupportedModelError, match="cannot dequantise Q8_K"):
        load_model(snapshot, device="cpu")


def test_k_quants_are_read(tmp_path: Path) -> None:
    model = gguf_model("qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=256)
    tensors = to_gguf(model)
    name, kind = "blk.1.ffn_up_exps.weight", GGMLQuantizationType.Q4_K
    tensors[name] = random_blocks(kind, tensors[name].shape)
    file = write_gguf(tmp_path / "m.gguf", "qwen3moe", metadata_of(model.config), tensors, raw_types={name: kind})
    snapshot = opened(file)
    slot = snapshot.tensors["model.layers.1.mlp.experts.up_proj.weight"]
    expected = gguf.quants.dequantize(tensors[name], kind)
    assert np.array_equal(snapshot.values(slot.row(3), "dequantised").numpy(), expected[3])
    assert gguf.GGUFReader(file).tensors[-1].n_bytes == snapshot.tensors[list(snapshot.tensors)[-1]].size
