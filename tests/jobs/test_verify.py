"""Verification notices every way in which a checkpoint can be something else than it claims."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import CheckpointError
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.verify import Check, check_files, verify
from shape_moe.progress import SILENT
from shape_moe.pruning.compare import file_hash
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import load_selection
from shape_moe.serving.manifest import read_manifest, to_document
from shape_moe.tracing.trace import load_trace
from support.data import write_lines


@pytest.fixture(scope="module")
def pruned(embedded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    file = write_lines(folder / "data.jsonl", examples("reversal", 16, seed=1))
    chosen = SelectOptions(keep=0.6, method=Method(routing="reroute"))
    prune(
        embedded,
        folder / "out",
        PruneOptions(chosen, ExampleOptions(DataOptions(str(file)), device="cpu"), device="cpu"),
    )
    return folder / "out"


@pytest.fixture
def copy(pruned, tmp_path) -> Path:
    return shutil.copytree(pruned, tmp_path / "copy")


def accept_hashes(folder: Path) -> None:
    """Pretend that the files were meant to be like that: only what is in them can give the change away."""
    manifest = read_manifest(folder)
    files = {name: file_hash(folder / name) for name in manifest.files if (folder / name).is_file()}
    manifest = replace(manifest, files=files)
    document = to_document(replace(manifest, digest=manifest.own_digest()))
    (folder / "shape" / "manifest.json").write_text(json.dumps(document))


def failed(folder: Path, **options) -> dict[str, Check]:
    return {check.name: check for check in verify(folder, device="cpu", **options) if check.passed is False}


def edit_json(file: Path, change) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_a_good_checkpoint_passes(pruned, embedded) -> None:
    checks = verify(pruned, original=embedded, device="cpu")
    assert [check.name for check in checks] == [
        "files",
        "selection and config",
        "tensors",
        "tokenizer",
        "original",
        "canary",
    ]
    assert all(check.passed for check in checks), checks


def test_changed_and_missing_files(copy) -> None:
    (copy / "tokenizer_config.json").write_text("{}")
    assert "tokenizer_config.json was changed" in failed(copy)["files"].detail
    (copy / "generation_config.json").unlink()
    assert "1 files are missing, the first is generation_config.json" in failed(copy)["files"].detail


def test_config_and_selection_must_agree(copy) -> None:
    edit_json(copy / "config.json", lambda c: c["shape_pruning"]["layers"]["0"].pop())
    accept_hashes(copy)
    found = failed(copy)
    assert "not what shape/selection.json says" in found["selection and config"].detail
    assert "canary" in found


def test_counts_must_be_as_selected(copy) -> None:
    edit_json(copy / "shape" / "selection.json", lambda s: s["layers"]["1"].pop())
    accept_hashes(copy)
    assert failed(copy).keys() >= {"selection and config", "tensors"}
    tensors = load_file(copy / "model.safetensors")
    name = next(n for n in tensors if "layers.2.mlp.experts.0.up_proj" in n)
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj.weight is there for" in failed(copy)["tensors"].detail or "tensors" in failed(copy)


def test_foreign_tokenizers(copy) -> None:
    edit_json(copy / "config.json", lambda c: c.update(vocab_size=200))
    accept_hashes(copy)
    assert "258 ids, the model embeds 200" in failed(copy)["tokenizer"].detail
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in failed(copy)["tokenizer"].detail


def test_swapped_experts_are_noticed_by_the_canary_and_the_original(copy, embedded) -> None:
    used = load_trace(copy / "shape" / "trace").sums("tokens")[1][load_selection(copy).layers[1]]
    busiest = np.argsort(-used)[:2]
    tensors = load_file(copy / "model.safetensors")
    for part in ("gate_proj", "up_proj", "down_proj"):
        first, second = (f"model.layers.1.mlp.experts.{i}.{part}.weight" for i in busiest)
        tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    accept_hashes(copy)
    found = failed(copy, original=embedded)
    assert found.keys() == {"original", "canary"}


def test_other_originals_are_refused(pruned, checkpoint) -> None:
    assert "made from another model" in failed(pruned, original=checkpoint("qwen3_moe"))["original"].detail


def test_a_dense_model_under_the_pruned_name(copy, embedded) -> None:
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(embedded / name, copy / name)
    accept_hashes(copy)
    assert failed(copy).keys() >= {"selection and config", "tensors", "canary"}


def test_small_noise_is_noticed(copy) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors[name] = tensors[name] + 0.3 * tensors[name].float().std().to(torch.bfloat16) * torch.randn(
        tensors[name].shape, generator=torch.Generator().manual_seed(0)
    ).to(torch.bfloat16)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    accept_hashes(copy)
    assert failed(copy).keys() == {"canary"}


def test_folders_that_are_no_pruned_checkpoint(embedded, tmp_path) -> None:
    for folder in (embedded, tmp_path):
        with pytest.raises(CheckpointError, match="not a checkpoint written by shape-moe"):
            verify(folder)


def files_check(folder: Path) -> tuple[bool, str]:
    """What the check of files alone says, without loading anything."""
    try:
        return check_files(folder, SILENT)
    except CheckpointError as error:
        return False, str(error)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "chat_template.jinja",
        "extra.safetensors",
        "pytorch_model.bin",
        "extra.py",
        "vocab",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_added_files_that_loaders_may_read(copy, name) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{}")
    passed, detail = files_check(copy)
    assert not passed
    assert name in detail


def test_added_files_that_no_loader_reads_are_named(copy) -> None:
    for name in ("notes.md", ".gitattributes"):
        (copy / name).write_text("x")
    passed, detail = files_check(copy)
    assert passed
    assert ".gitattributes, notes.md: not part of the checkpoint" in detail


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", {}),
        ("model", "another"),
        ("revision", "0" * 40),
        ("fingerprint", "sha256:" + "0" * 64),
        ("layout_fingerprint", "sha256:" + "0" * 64),
        ("target", "stock"),
        ("shape_moe", "9.9"),
        ("canary_missing", "--no-logits was given"),
        ("digest", None),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_edits_of_the_manifest(copy, key, value) -> None:
    edit_json(copy / "shape" / "manifest.json", lambda document: document.update({key: value}))
    passed, detail = files_check(copy)
    assert not passed
    assert "was changed since it was written" in detail


def test_manifests_without_a_digest_say_what_they_lack(copy) -> None:
    def age(document):
        document["format_version"] = 1
        del document["digest"]

    edit_json(copy / "shape" / "manifest.json", age)
    passed, detail = files_check(copy)
    assert passed
    assert "older version without a digest" in detail
    edit_json(copy / "shape" / "manifest.json", lambda document: document["files"].clear())
    passed, detail = files_check(copy)
    assert not passed
    assert "not part of the checkpoint" in detail


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "shape/../../outside"])
def test_manifests_name_nothing_outside(copy, name) -> None:
    def point(document):
        document["format_version"], document["files"] = 1, {name: "0" * 64}
        del document["digest"]

    edit_json(copy / "shape" / "manifest.json", point)
    assert "names a file outside the checkpoint" in files_check(copy)[1]
