"""A model of which one layer is in memory does what the whole model does, bit for bit, and reads each byte once."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shape_moe.architectures import layered_model
from shape_moe.architectures.layer_reader import WeightReader
from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.architectures.loading import load_model
from shape_moe.architectures.plain_model import about_quantisation
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, UnsupportedModelError, UsageError
from support.gguf_files import gguf_model, matrices, save_gguf
from support.mxfp4 import save_mxfp4_model
from support.quantised import save_quantised
from support.tiny_models import make_model, random_tokens, save_model


def two_batches():
    """Tokens and attention masks of two batches of different shapes, padding among them."""
    first, second = random_tokens(3, 20), random_tokens(2, 9, seed=1)
    mask = torch.ones_like(first)
    mask[1, 12:] = 0
    return [(first, mask), (second, torch.ones_like(second))]


def through(model: LayeredModel, batches):
    """What each batch is before each layer and after the last, and its logits."""
    with model.embeddings():
        states = [[model.enter(*batch)] for batch in batches]
    for _ in model.layers():
        for (_, mask), states_of in zip(batches, states, strict=True):
            states_of.append(model.advance(states_of[-1], mask))
    with model.head():
        logits = [model.logits(of[-1], mask) for (_, mask), of in zip(batches, states, strict=True)]
    return states, logits


def whole(folder, batches, dtype):
    """The same from the whole model in memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return [
            model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
            for ids, mask in batches
        ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_is_bit_identical_to_the_whole_model(family: str, dtype: str, checkpoint) -> None:
    folder, batches = checkpoint(family), two_batches()
    snapshot = open_snapshot(folder)
    model = LayeredModel(snapshot, device="cpu", dtype=dtype)
    states, logits = through(model, batches)
    expected = whole(folder, batches, getattr(torch, dtype))
    for found, found_logits, wanted in zip(states, logits, expected, strict=True):
        assert torch.equal(found_logits, wanted.logits)
        # Transformers gives the last state after the final norm
        assert all(torch.equal(a, b) for a, b in zip(found[:-1], wanted.hidden_states[:-1], strict=True))
    assert model.bytes_read == snapshot.total_bytes


@pytest.mark.parametrize("name", ["fp8_block", "gptq_act", "compressed_nvfp4", "bitsandbytes_nested", "mlx_4"])
def test_quantised_models_are_bit_identical_too(name, tmp_path) -> None:
    save_quantised(tmp_path / "model", name)
    assert_layers_are_those_of_the_plain_model(tmp_path / "model", "float32")


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_stacked_quantised_experts_are_bit_identical_too(dtype, tmp_path) -> None:
    assert_layers_are_those_of_the_plain_model(save_mxfp4_model(tmp_path / "model"), dtype)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2", "glm4_moe"])
def test_gguf_files_are_bit_identical_too(family, tmp_path) -> None:
    file = save_gguf(gguf_model(family), tmp_path / "model.gguf", matrices(GGMLQuantizationType.Q4_0))
    assert_layers_are_those_of_the_plain_model(file, "auto")


def assert_layers_are_those_of_the_plain_model(path, dtype) -> None:
    snapshot, batches, notes = open_snapshot(path), two_batches(), []
    layered = LayeredModel(snapshot, device="cpu", dtype=dtype, note=notes.append)
    _, logits = through(layered, batches)
    model = load_model(snapshot, device="cpu", dtype=dtype)
    assert {n: p.dtype for n, p in layered.model.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    for (ids, mask), found in zip(batches, logits, strict=True):
        with torch.no_grad():
            assert torch.equal(found, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
    assert layered.bytes_read == snapshot.total_bytes
    assert notes == [about_quantisation(snapshot, dtype)]


def test_the_checkpoints_own_dtype_is_the_default(tmp_path) -> None:
    folder = save_model(make_model("deepseek_v3", dtype=torch.bfloat16), tmp_path / "model")
    ours, theirs = LayeredModel(open_snapshot(folder), device="cpu"), AutoModelForCausalLM.from_pretrained(folder)
    assert {n: p.dtype for n, p in ours.model.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}


def test_tied_embeddings_are_the_head_too(embedded) -> None:
    snapshot, batches = open_snapshot(embedded), two_batches()
    assert snapshot.config["tie_word_embeddings"]
    _, logits = through(LayeredModel(snapshot, device="cpu", dtype="float32"), batches)
    expected = whole(embedded, batches, torch.float32)
    assert all(torch.equal(a, b.logits) for a, b in zip(logits, expected, strict=True))


def test_one_layer_is_in_memory_while_the_next_is_read(checkpoint, monkeypatch) -> None:
    read: list[int] = []
    real, seen = WeightReader.read, threading.Event()

    def counted(self, slots):
        slots = list(slots)
        read.extend({open_snapshot(checkpoint("olmoe")).role(slot.name).layer for slot in slots})
        assert threading.current_thread() is not threading.main_thread() or read[-1] == -1
        found = real(self, slots)
        seen.set()
        return found

    model = LayeredModel(open_snapshot(checkpoint("olmoe")), device="cpu")
    monkeypatch.setattr(WeightReader, "read", counted)
    for layer in model.layers():
        held = {name for name, tensor in model.model.named_parameters() if not tensor.is_meta}
        assert held
        assert all(name.startswith(f"model.layers.{layer}.") for name in held)
        if layer < 2:
            seen.wait(30)
            while len(read) < layer + 2:  # the next layer is read without anybody asking
                seen.wait(0.01)
        seen.clear()
    assert read == [0, 1, 2]
    assert all(tensor.is_meta for tensor in model.model.parameters())


def test_layers_before_the_start_are_not_read(checkpoint) -> None:
    snapshot = open_snapshot(checkpoint("glm4_moe"))
    model = LayeredModel(snapshot, device="cpu")
    assert list(model.layers(1, 2)) == [1]
    assert model.bytes_read == sum(slot.size for slot in snapshot.layer(1))


def test_a_layer_that_fails_leaves_nothing_behind(checkpoint) -> None:
    model = LayeredModel(open_snapshot(checkpoint("olmoe")), device="cpu")
    layers = model.layers()
    next(layers)
    with pytest.raises(RuntimeError, match="stop"):
        layers.throw(RuntimeError("stop"))
    assert all(tensor.is_meta for tensor in model.model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"), "q_proj.weight.*missing"),
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight.*missing"),
        (lambda tensors: tensors.update({"odd": torch.zeros(2)}), "odd.*unknown"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(7, 32)}),
            r"lm_head.weight is 7 x 32 on disk and 128 x 32",
        ),
    ],
)
def test_weights_that_are_not_all_there_are_refused_before_any_is_read(
    change, said, checkpoint, tmp_path, monkeypatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = load_file(checkpoint("olmoe") / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((checkpoint("olmoe") / "config.json").read_text())
    monkeypatch.setattr(WeightReader, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=said):
        LayeredModel(open_snapshot(folder), device="cpu")


def test_what_cannot_be_read_layer_by_layer_is_refused(checkpoint, tmp_path) -> None:
    with pytest.raises(UsageError, match="dtype must be one of"):
        LayeredModel(open_snapshot(checkpoint("olmoe")), device="cpu", dtype="int8")
    folder = tmp_path / "own"
    folder.mkdir()
    config = json.loads((checkpoint("olmoe") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "a.B"}}))
    (folder / "model.safetensors").write_bytes((checkpoint("olmoe") / "model.safetensors").read_bytes())
    assert layered_model.why_not_layered(open_snapshot(folder)) is None
    with pytest.raises(UnsupportedModelError, match="code of its own"):
        LayeredModel(open_snapshot(folder, trust_remote_code=True), device="cpu")


def test_a_file_that_shrinks_is_named(checkpoint, tmp_path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((checkpoint("olmoe") / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text((checkpoint("olmoe") / "config.json").read_text())
    snapshot = open_snapshot(tmp_path)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"model.safetensors has become shorter"):
        WeightReader(snapshot).read(snapshot.plain.values())


def test_values_are_those_on_disk_and_are_counted(checkpoint) -> None:
    snapshot = open_snapshot(checkpoint("gpt_oss"))
    reader = WeightReader(snapshot)
    found = reader.read(snapshot.plain.values())
    expected = load_file(checkpoint("gpt_oss") / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert reader.bytes_read == sum(tensor.nbytes for tensor in expected.values())
