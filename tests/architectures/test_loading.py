"""A model is loaded with all of its weights, or refused by the names of those that are not as they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, UnsupportedModelError
from support.fp8 import save_fp8_model
from support.mxfp4 import save_mxfp4_model
from support.tiny_models import make_model, random_tokens, save_model


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")


def edit(folder: Path, change) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **entries) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(open_snapshot(folder), device="cpu")
    return str(caught.value)


def loaded(folder: Path, **options) -> tuple[torch.nn.Module, list[str]]:
    notes: list[str] = []
    return load_model(open_snapshot(folder, **options), device="cpu", note=notes.append), notes


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"],
)
def test_missing_weights(folder, name) -> None:
    edit(folder, lambda tensors: tensors.pop(name))
    assert f"1 tensor ({name}) is missing, and would be random" in refusal(folder)


def test_many_missing_weights_are_counted(folder) -> None:
    def drop(tensors) -> None:
        for name in [name for name in tensors if ".self_attn.k_" in name]:
            del tensors[name]

    edit(folder, drop)
    names = [f"model.layers.{layer}.self_attn.{part}.weight" for layer in range(3) for part in ("k_norm", "k_proj")]
    assert f"6 tensors ({', '.join(names[:3])} and 3 more) are missing" in refusal(folder)


def test_experts_of_a_layer_that_are_missing(folder) -> None:
    def drop(tensors) -> None:
        for name in [name for name in tensors if ".layers.2.mlp.experts." in name and ".down_proj." in name]:
            del tensors[name]

    edit(folder, drop)
    assert "model.layers.2.mlp.experts.down_proj) is missing" in refusal(folder)


def test_one_expert_of_many_that_is_missing(folder) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.2.mlp.experts.5.down_proj.weight"))
    assert "model.layers.2.mlp.experts.down_proj is 15 x 32 x 24 on disk and 16 x 32 x 24 in the model" in refusal(
        folder
    )


def test_unknown_weights(folder) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": torch.zeros(4)}))
    assert "1 tensor (model.layers.0.self_attn.sinks) is unknown to Qwen3MoeForCausalLM" in refusal(folder)
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": torch.zeros(1)}))
    assert "2 tensors (model.layers.0.self_attn.k_scale, model.layers.0.self_attn.sinks) are unknown" in refusal(folder)


def test_weights_of_another_shape(folder) -> None:
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(130, 32)}))
    assert "lm_head.weight is 130 x 32 on disk and 128 x 32 in the model" in refusal(folder)


def test_layers_past_the_last_one(folder) -> None:
    """A config.json that counts too few layers would leave the others out without a word."""
    edit_config(folder, num_hidden_layers=2)
    assert "model.layers.2.input_layernorm.weight" in refusal(folder)


def test_tied_weights_need_not_be_there(tmp_path) -> None:
    folder = save_model(make_model("qwen3_moe", tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in open_snapshot(folder).tensors
    model, notes = loaded(folder)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert notes == []


def test_sound_models_of_every_family(family, checkpoint) -> None:
    model, notes = loaded(checkpoint(family))
    expected = make_model(family).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert notes == []


@pytest.mark.parametrize(("save", "label"), [(save_mxfp4_model, "MXFP4"), (save_fp8_model, "FP8, blocks of 16 x 16")])
def test_sound_quantised_models(tmp_path, save, label) -> None:
    folder = save(tmp_path / "model")
    assert loaded(folder)[1] == [f"{label}: dequantised to bfloat16 to be run here."]
    edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    assert "model.layers.1.self_attn.q_proj.weight" in refusal(folder)


def test_scales_that_only_servers_use(tmp_path) -> None:
    folder = save_fp8_model(tmp_path / "model")
    names = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(3) for part in "kv"]
    edit(folder, lambda tensors: tensors.update({name: torch.ones(1) for name in names}))
    assert loaded(folder)[1][1:] == [
        f"Tensors of {folder} that are no part of the loaded model, as expected: 6 of quantisation scales."
    ]


def with_mtp_layer(folder: Path, copied: int, index: int) -> int:
    """Add a layer for multi-token prediction: a copy of another; the number of its tensors."""
    added = {}

    def add(tensors) -> None:
        old, new = f"layers.{copied}.", f"layers.{index}."
        added.update({name.replace(old, new): t.clone() for name, t in tensors.items() if old in name})
        added[f"model.layers.{index}.eh_proj.weight"] = torch.zeros(32, 64)
        tensors.update(added)

    edit(folder, add)
    return len(added)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_for_multi_token_prediction_are_counted(checkpoint, tmp_path, name, capfd) -> None:
    folder = shutil.copytree(checkpoint(name), tmp_path / "model")
    count = with_mtp_layer(folder, 2, 3)
    _, notes = loaded(folder)
    text = f"as expected: {count} of multi-token-prediction layers."
    assert notes == [f"Tensors of {folder} that are no part of the loaded model, {text}"]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_tensors_that_the_class_ignores_are_counted(checkpoint, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    stock = type(make_model("olmoe"))
    monkeypatch.setattr(stock, "_keys_to_ignore_on_load_unexpected", [r"\.extra$"])
    edit(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
    assert "as expected: 1 that OlmoeForCausalLM ignores." in loaded(folder)[1][0]


def test_reports_of_transformers_are_not_shown(folder, capfd) -> None:
    edit(folder, lambda tensors: tensors.update({f"model.x{i}": torch.zeros(2) for i in range(20)}))
    refusal(folder)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


CUSTOM = '''
import transformers

class OwnForCausalLM(transformers.Qwen3MoeForCausalLM):
    """A model's own code: the stock class with another number on its logits."""
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output
'''
OPAQUE = """
import torch, transformers

class Experts(torch.nn.Module):
    def forward(self, hidden, ids, weights):
        return hidden * 0

class OwnForCausalLM(transformers.Qwen3MoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for index in (0, 2):
            experts = self.model.layers[index].mlp.experts
            own = Experts()
            own.gate_up_proj, own.down_proj = experts.gate_up_proj, experts.down_proj
            self.model.layers[index].mlp.experts = own
"""


def with_code(folder: Path, code: str) -> Path:
    (folder / "modeling_own.py").write_text(code)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    return folder


def test_transformers_own_class_is_used_beside_foreign_code(folder) -> None:
    model, notes = loaded(with_code(folder, CUSTOM))
    assert type(model) is type(make_model("qwen3_moe"))
    assert notes == [
        "The model names code of its own (modeling_own.OwnForCausalLM); Transformers' own Qwen3MoeForCausalLM is used "
        "instead."
    ]


def test_foreign_code_is_used_where_it_is_trusted(folder) -> None:
    model, notes = loaded(with_code(folder, CUSTOM), trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert notes == ["The code that comes with the model is used (modeling_own.OwnForCausalLM)."]
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        expected = 2 * make_model("qwen3_moe")(input_ids=tokens).logits
        assert torch.allclose(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_foreign_code_without_the_experts_interface(folder) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"comes with the model \(modeling_own.OwnForCausalLM\) cannot be traced.*experts interface",
    ):
        loaded(with_code(folder, OPAQUE), trust_remote_code=True)


def test_both_one_file_and_an_index(folder) -> None:
    """Transformers would read the one, and this package the other."""
    other = make_model("qwen3_moe", seed=1)
    other.save_pretrained(folder / "shards", max_shard_size="40KB")
    for file in (folder / "shards").glob("*.safetensors*"):
        file.rename(folder / file.name)
    with pytest.raises(CheckpointError, match="model.safetensors and model.safetensors.index.json.*remove the one"):
        open_snapshot(folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder)
    assert open_snapshot(folder).moe_layers == (0, 2)
