"""Documents that somebody else wrote, damaged on purpose or foreign: one sentence, never a traceback."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, ShapeMoeError, UnsupportedModelError
from shape_moe.jobs.inspect import inspect_model
from support.tiny_models import make_model, save_model

LONG_NUMBER = "9" * 5000


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")


def change(folder: Path, **entries) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def remove(folder: Path, *keys: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in keys}))


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, "three", [3], {}, 2.5, -1, 0, True, 10**30, float("inf")])
def test_numbers_that_every_model_has(folder, key, value) -> None:
    change(folder, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} must be a whole number above 0, not"):
        inspect_model(folder)


@pytest.mark.parametrize(
    "key", ["num_experts", "num_experts_per_tok", "head_dim", "num_key_value_heads", "sliding_window"]
)
@pytest.mark.parametrize("value", ["three", [3], {}, 2.5, -1, True, 10**30, float("nan")])
def test_other_counts(folder, key, value) -> None:
    change(folder, **{key: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} must be a whole number, not"):
        inspect_model(folder)


@pytest.mark.parametrize(
    ("entries", "key"),
    [
        ({"model_type": ["qwen3_moe"]}, "model_type"),
        ({"quantization_config": "gptq"}, "quantization_config"),
        ({"auto_map": ["a"]}, "auto_map"),
        ({"layer_types": "full_attention"}, "layer_types"),
    ],
)
def test_other_values(folder, entries, key) -> None:
    change(folder, **entries)
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} must be a "):
        inspect_model(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "{" + f'"vocab_size": {LONG_NUMBER}' + "}", "{", "", "[]"]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_text_that_no_parser_takes(folder, name, text) -> None:
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{name} (is not valid|does not hold)"):
        open_snapshot(folder)
    (folder / name).write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=rf"{name} is not valid JSON"):
        open_snapshot(folder)


@pytest.mark.parametrize(
    "shard", [3, None, ["a"], {"a": 1}, "a\0b.safetensors", "n" * 300, "é" * 200, "\ud800", "a\nb"]
)
def test_index_entries_that_are_no_file_names(folder, shard) -> None:
    names = open_snapshot(folder).tensors
    index = {"weight_map": dict.fromkeys(names, "model.safetensors") | {"x": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json names .*, which is not a file name"):
        open_snapshot(folder)


def write_header(file: Path, text: str) -> None:
    content = text.encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + bytes(8))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 100_000, "nested too deeply"),
        (f'{{"a": {LONG_NUMBER}}}', "not valid JSON"),
        ('{"__metadata__": ["format"]}', "__metadata__ is not a table"),
        ('{"__metadata__": {"format": 3}}', "__metadata__ is not a table"),
        ('{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}', "malformed"),
        ('{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', "malformed"),
        ('{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}', "malformed"),
        ('{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}', "malformed"),
        ('{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}', "malformed"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}', "malformed"),
        ('{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', "malformed"),
        ('{"a": {"dtype": "F32", "shape": [' + "1," * 50 + '2], "data_offsets": [0, 8]}}', "malformed"),
        ('{"a": [1]}', "malformed"),
        ('{"a\\u0000b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "which is not a name"),
        ('{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "which is not a name"),
    ],
)
def test_headers(folder, text, word) -> None:
    write_header(folder / "model.safetensors", text)
    with pytest.raises(CheckpointError, match=word):
        open_snapshot(folder)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_value_under_any_key_is_read_or_refused(checkpoint, tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = checkpoint("deepseek_v3")
    config = json.loads((source / "config.json").read_text())
    config[data.draw(st.sampled_from(sorted(config)))] = data.draw(_VALUES)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    with contextlib.suppress(ShapeMoeError):
        fingerprint(inspect_model(folder, fit=2**30).snapshot)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_experts_per_tok"])
def test_numbers_left_to_the_class(tmp_path, key) -> None:
    """What config.json does not say is what Transformers' class says, and the user hears of it."""
    default = {"num_hidden_layers": 24, "hidden_size": 2048, "num_experts_per_tok": 8}[key]
    changes = {"num_hidden_layers": 24, "hidden_size": 32, "num_experts_per_tok": 4} | {key: default}
    folder = save_model(make_model("qwen3_moe", mlp_only_layers=[*range(2, 24)], **changes), tmp_path / "model")
    complete = open_snapshot(folder)
    remove(folder, key)
    snapshot = open_snapshot(folder)
    assert snapshot.config == {**snapshot.config, key: default}
    assert snapshot.notes == (
        f"{folder / 'config.json'} does not say {key}: the default of Qwen3MoeConfig, {default}, is used.",
    )
    assert snapshot.moe == complete.moe
    assert fingerprint(snapshot) == fingerprint(complete)


def test_complete_configurations_need_no_transformers(folder) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from shape_moe.jobs.inspect import inspect_model; inspect_model(sys.argv[1]); "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_dense_models_have_no_experts(folder) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}))
    with pytest.raises(UnsupportedModelError, match=r"This model \(llama\) has no experts: there is nothing to prune"):
        inspect_model(folder)
    unknown = {"model_type": "kimi", "n_routed_experts": 64, "auto_map": {"AutoModelForCausalLM": "modeling_kimi.Kimi"}}
    (folder / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(UnsupportedModelError, match=r"'kimi' is not supported.*comes with it \(modeling_kimi.Kimi\)"):
        inspect_model(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}))
    with pytest.raises(UnsupportedModelError, match="'dbrx' cannot be pruned: its experts do not use"):
        inspect_model(folder)


def test_folders_and_files_that_are_no_models(folder, tmp_path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_snapshot(path)
        return str(caught.value)

    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert "LoRA adapter of org/base beside a model" in refused(folder)
    (folder / "config.json").unlink()
    assert "is a LoRA adapter of org/base, not a model: merge it" in refused(folder)
    (folder / "adapter_config.json").unlink()
    assert "config.json is missing (found generation_config.json, model.safetensors)" in refused(folder)
    assert f"config.json is missing (it is in {folder.name}2)" in refused(_beside(folder, tmp_path))
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "holds GGUF files (m-Q4_K_M.gguf)" in refused(tmp_path / "gguf")
    assert "name the file itself" in refused(tmp_path / "gguf")
    assert "ends within its header" in refused(tmp_path / "gguf" / "m-Q4_K_M.gguf")
    assert "is a file: name the folder" in refused(folder / "model.safetensors")
    assert "is a folder of the hub's cache" in refused(_cache(tmp_path))


def _beside(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "parent" / f"{folder.name}2").mkdir(parents=True)
    (tmp_path / "parent" / f"{folder.name}2" / "config.json").write_text("{}")
    return tmp_path / "parent"


def _cache(tmp_path: Path) -> Path:
    (tmp_path / "models--org--name" / "snapshots" / "abc").mkdir(parents=True)
    return tmp_path / "models--org--name"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_broken_links_of_a_cache_are_named(folder, name) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/0123")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to \.\./\.\./blobs/0123, which is not there"):
        open_snapshot(folder)


def test_names_that_no_file_can_have() -> None:
    for name in ("a\0b", "n" * 5000, "/" + "n" * 300):
        with pytest.raises(CheckpointError):
            open_snapshot(name)


def test_headers_of_unusual_but_sound_files(folder) -> None:
    """What the format allows is read: any order of keys, empty tensors, scalars, metadata."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "é"})
    assert open_snapshot(folder).tensors.keys() == tensors.keys()
