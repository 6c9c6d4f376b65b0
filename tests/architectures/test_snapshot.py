"""Models on disk: layers, experts, fingerprints, sizes; and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.fingerprint import fingerprint, layout_fingerprint
from shape_moe.architectures.loading import loaded_bytes, why_not_loadable
from shape_moe.architectures.moe_config import read_moe_config
from shape_moe.architectures.sizes import kv_cache_bytes, measure
from shape_moe.architectures.snapshot import looks_like_path, open_snapshot
from shape_moe.errors import CheckpointError, UnsupportedModelError
from support.mxfp4 import save_mxfp4_model
from support.tiny_models import make_config, make_model, moe_block, router_of, save_model


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_layers_and_roles_of_every_family(family, checkpoint) -> None:
    snapshot = open_snapshot(checkpoint(family))
    model = make_model(family)
    live = [i for i, layer in enumerate(model.model.layers) if hasattr(moe_block(layer), "experts")]
    assert list(snapshot.moe_layers) == live
    roles = {name: snapshot.role(name) for name in snapshot.tensors}
    bytes_by_role = {"expert": 0, "packed": 0, "router": 0, "other": 0}
    for name, role in roles.items():
        bytes_by_role[role.role] += snapshot.tensors[name].size
    experts = sum(p.numel() for layer in live for p in moe_block(model.model.layers[layer]).experts.parameters())
    router = 0
    for layer in live:
        module = router_of(model.model.layers[layer])
        router += sum(t.numel() for t in [*module.parameters(), *module.buffers()])
    assert bytes_by_role["expert"] + bytes_by_role["packed"] == 4 * experts
    assert bytes_by_role["router"] == 4 * router
    assert snapshot.moe.routing.top_k == model.config.num_experts_per_tok


def test_facts_name_classes_of_transformers() -> None:
    import transformers

    for facts in FAMILIES.values():
        stock = getattr(transformers, facts.stock_class)
        assert stock.config_class.model_type == facts.model_type


def test_floors_know_router_groups() -> None:
    grouped = read_moe_config(make_config("deepseek_v3").to_dict()).routing
    assert (grouped.groups, grouped.floor, grouped.top_k) == (4, 8, 3)  # two of four groups serve 3: two in each of 4
    greedy = read_moe_config(make_config("deepseek_v2").to_dict()).routing
    assert (greedy.groups, greedy.floor) == (1, 3)


def test_gates_that_do_not_add_up_to_one() -> None:
    found = {
        name: read_moe_config(make_config(name).to_dict()).renormalises for name in ("qwen3_moe", "qwen2_moe", "olmoe")
    }
    assert found == {"qwen3_moe": True, "qwen2_moe": False, "olmoe": False}
    assert read_moe_config(make_config("deepseek_v2").to_dict()).renormalises is False
    assert read_moe_config(make_config("mixtral").to_dict()).renormalises is True


def test_fingerprints_identify_routers(checkpoint, tmp_path) -> None:
    source = checkpoint("olmoe")
    first = open_snapshot(source)
    sharded = open_snapshot(save_model(make_model("olmoe"), tmp_path / "shards", max_shard_size="20KB"))
    assert fingerprint(first) == fingerprint(sharded)
    assert layout_fingerprint(first) == layout_fingerprint(sharded)
    other = open_snapshot(save_model(make_model("olmoe", seed=1), tmp_path / "other"))
    assert fingerprint(other) != fingerprint(first)
    assert layout_fingerprint(other) == layout_fingerprint(first)
    tensors = load_file(source / "model.safetensors")
    experts = {n: (t.to(torch.float16) if ".experts." in n else t) for n, t in tensors.items()}
    requantised = shutil.copytree(source, tmp_path / "requantised")
    save_file(experts, requantised / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(open_snapshot(requantised)) == fingerprint(first)
    assert layout_fingerprint(open_snapshot(requantised)) != layout_fingerprint(first)
    change_config(requantised, num_experts_per_tok=2)
    assert fingerprint(open_snapshot(requantised)) != fingerprint(first)


def test_sizes_add_up(checkpoint, tmp_path) -> None:
    for folder in (checkpoint("deepseek_v2"), save_mxfp4_model(tmp_path / "mxfp4")):
        snapshot = open_snapshot(folder)
        size = measure(snapshot)
        assert size.total == snapshot.total_bytes == sum(size.dtypes.values())
        assert size.at_keep(size.num_experts) == size.total
        half = size.at_keep(size.num_experts // 2)
        assert half == pytest.approx(size.total - size.experts / 2)
        for budget in (half, half + 1000, size.total):
            kept = size.most_kept(budget)
            assert size.at_keep(kept) <= budget
            assert kept == size.num_experts or size.at_keep(kept + 1) > budget
    assert size.at_keep(size.num_experts, "bf16") == pytest.approx(loaded_bytes(snapshot), rel=0.01)


def test_kv_caches() -> None:
    config = {
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "hidden_size": 2048,
    }
    assert kv_cache_bytes(config, 16384, 8) == 8 * 16384 * 48 * 2 * 4 * 128 * 2
    latent = {
        "num_hidden_layers": 27,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "num_attention_heads": 16,
        "hidden_size": 2048,
    }
    assert kv_cache_bytes(latent, 1000, 2) == 2 * 1000 * 27 * 576 * 2
    mixed = {
        **config,
        "num_hidden_layers": 2,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    assert kv_cache_bytes(mixed, 1000, 1) == (128 + 1000) * 2 * 4 * 128 * 2
    hybrid = {**config, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    assert kv_cache_bytes(hybrid, 1000, 1) == 1000 * 2 * 4 * 128 * 2


def test_what_does_not_fit_is_said() -> None:
    assert why_not_loadable(10**6, "cpu") is None
    assert "GiB are free" in why_not_loadable(10**15, "cpu")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "llama"}, "'llama' is not supported; supported: .*deepseek_v2.*add-a-model"),
        ({"model_type": None}, r"not supported"),
        ({"num_experts": None, "num_local_experts": 0}, "This model has no experts"),
        ({"shape_pruning": {}}, "already pruned.*start from the original"),
    ],
)
def test_models_that_cannot_be_pruned(checkpoint, tmp_path, changes, word) -> None:
    folder = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    change_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=word):
        _ = open_snapshot(folder).moe_layers


def test_experts_that_are_not_all_there(checkpoint, tmp_path) -> None:
    folder = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    fewer = {n: t for n, t in tensors.items() if ".layers.2.mlp.experts.15." not in n}
    save_file(fewer, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="promises 16 experts, layer 2 has 15 on disk"):
        _ = open_snapshot(folder).moe_layers


def test_unknown_router_tensors_are_refused(checkpoint, tmp_path) -> None:
    folder = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="quantised router cannot be pruned"):
        _ = open_snapshot(folder).moe_layers


def test_packed_tensors_of_another_shape_are_refused(checkpoint, tmp_path) -> None:
    folder = shutil.copytree(checkpoint("gpt_oss"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_bias"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="layout is not understood"):
        _ = open_snapshot(folder).moe_layers


def test_other_weight_formats_are_named(tmp_path, checkpoint) -> None:
    shutil.copyfile(checkpoint("olmoe") / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin.*only safetensors"):
        open_snapshot(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not hold a JSON object"):
        open_snapshot(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_snapshot(tmp_path)


def test_indices_that_promise_too_much(checkpoint, tmp_path) -> None:
    folder = save_model(make_model("olmoe"), tmp_path / "shards", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.extra"] = next(iter(document["weight_map"].values()))
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"1 tensors of the index are in no shard, the first is model\.extra"):
        open_snapshot(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_snapshot(folder)


@pytest.mark.parametrize(
    ("name", "is_path"),
    [("./m", True), ("../m", True), ("/m", True), ("~/m", True), (".m", True), ("m", False), ("org/m", False)],
)
def test_names_that_can_only_be_paths(name, is_path) -> None:
    assert looks_like_path(name) is is_path
