"""Wrong facts are errors, drafting layers are left out aloud, and what cannot be is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shape_moe.architectures.config_file import check_config
from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.moe_config import read_moe_config
from shape_moe.architectures.refused_families import REFUSED
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.batches import make_batch
from shape_moe.errors import CheckpointError, ShapeMoeError, UnsupportedModelError
from shape_moe.jobs.families import families
from shape_moe.progress import Silent
from shape_moe.pruning.writers import SafetensorsFolder, what_is_left_out
from shape_moe.tracing.transformers_model import ModelTracer
from support.data import make_examples
from support.family_models import tiny_config, tiny_family
from support.selections import random_selection


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("granitemoeshared", {"beside": ()}),
        ("granitemoeshared", {"residual_scale_key": None}),
        ("minimax", {"stream_is_normed": False}),
        ("minimax", {"stream_scale_key": None}),
        ("cohere2_moe", {"parallel": ()}),
    ],
)
def test_facts_that_do_not_add_up_are_errors(name, wrong, monkeypatch) -> None:
    model = tiny_family(name)
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], **wrong))
    tracer = ModelTracer(model)
    with tracer.attached(), pytest.raises(ShapeMoeError, match="facts do not fit"):
        tracer.add(make_batch(make_examples(2), [0, 1], 0))


@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.experts.3.up_proj.weight", "model.layers.2.mlp.gate.weight"])
def test_layers_for_multi_token_prediction_are_left_out_aloud(name: str, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    tiny_family("qwen3_next").save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: torch.ones(8, 4)}, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "mtp_num_hidden_layers": 1}))
    snapshot = open_snapshot(source)
    (said,) = what_is_left_out(snapshot)
    assert said.startswith("1 tensors of multi-token-prediction layers are left out")
    out.mkdir()
    SafetensorsFolder("stock").write(snapshot, random_selection(snapshot, "reroute", "equal"), out, Silent())
    assert name not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["mtp_num_hidden_layers"] == 0


def test_families_that_cannot_be_pruned_are_refused_with_the_reason() -> None:
    for name, reason in REFUSED.items():
        with pytest.raises(UnsupportedModelError) as caught:
            read_moe_config({"model_type": name, "num_experts": 8})
        assert reason in str(caught.value)
        assert name in str(caught.value)


def test_every_family_has_a_grade() -> None:
    found = {support.model_type: support.grade for support in families()}
    assert found.keys() == FAMILIES.keys() | REFUSED.keys()
    assert found["qwen3_moe"] == "full"
    assert found["llama4"] == "refused"
    assert all(support.remarks for support in families() if support.grade != "full")


def test_numbers_that_are_listed_for_every_layer() -> None:
    config = tiny_config("hunyuan_v1_moe").to_dict()
    listed = {**config, "num_experts": [8, 8], "moe_topk": [2, 2]}
    check_config(listed, "config.json")
    assert (read_moe_config(listed).num_experts, read_moe_config(listed).top_k) == (8, 2)
    with pytest.raises(CheckpointError, match=r"moe_topk must be a whole number, not \[2, 3\]"):
        check_config({**config, "moe_topk": [2, 3]}, "config.json")
