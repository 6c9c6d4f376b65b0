"""Inspection reads headers alone, of local and of hub models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import huggingface_hub
import pytest

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.jobs.inspect import inspect_model, keep_that_fits


def test_sizes_fall_with_the_keep_rate(checkpoint) -> None:
    found = inspect_model(checkpoint("deepseek_v2"))
    sizes = list(found.sizes.values())
    assert sizes == sorted(sizes, reverse=True)
    assert found.sizes[1.0] == found.size.total
    assert found.fits == ()


def test_what_fits_is_the_largest_that_does(checkpoint) -> None:
    total = inspect_model(checkpoint("olmoe")).size.total
    fit = int(total * 0.8 / 0.9)
    found = inspect_model(checkpoint("olmoe"), fit=fit, context=1)
    stored = found.fits[0]
    assert not stored.dense_fits
    assert stored.weights_bytes + found.kv_bytes <= 0.9 * fit
    one_more = found.size.at_keep(round(stored.keep * found.size.num_experts) + 1)
    assert one_more + found.kv_bytes > 0.9 * fit
    assert keep_that_fits(open_snapshot(checkpoint("olmoe")), fit, 1, 1) == stored.keep
    assert all(entry.dense_fits for entry in inspect_model(checkpoint("olmoe"), fit=100 * total).fits)
    with pytest.raises(UsageError, match=r"No keep rate fits.*--context"):
        keep_that_fits(open_snapshot(checkpoint("olmoe")), 1000, 1, 1)


@dataclass
class Info:
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass
class File:
    tensors: dict[str, Info]


@dataclass
class Repo:
    files_metadata: dict[str, File] = field(default_factory=dict)


def test_hub_models_are_not_downloaded(checkpoint, monkeypatch) -> None:
    """Only headers and config.json are asked for; the hub's answers are played by a local model."""
    folder = checkpoint("mixtral")
    local = open_snapshot(folder)
    infos = {n: Info(s.dtype, list(s.shape), (s.start, s.start + s.size)) for n, s in local.tensors.items()}
    monkeypatch.setattr(
        huggingface_hub, "get_safetensors_metadata", lambda *_a, **_k: Repo({"model.safetensors": File(infos)})
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_a, **_k: str(folder / "config.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: pytest.fail("downloaded"))
    found = inspect_model("org/model")
    assert found.snapshot.name == "org/model"
    assert found.size == inspect_model(folder).size


def test_hub_models_offline_come_from_the_local_copy(checkpoint, monkeypatch, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="hub could not provide it"):
        inspect_model("nobody/no-such-model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: str(checkpoint("mixtral")))
    assert inspect_model("org/model").size == inspect_model(checkpoint("mixtral")).size


def test_shards_in_snapshots_carry_their_commit(checkpoint, monkeypatch, tmp_path) -> None:
    import shutil

    commit = "0123456789abcdef"
    cached = shutil.copytree(checkpoint("mixtral"), tmp_path / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: str(cached))
    assert open_snapshot("org/model").revision == commit
    assert json.loads((cached / "config.json").read_text())["model_type"] == "mixtral"
