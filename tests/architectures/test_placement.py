"""Device maps: a model spread over memory and disk does what it does in memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from shape_moe.architectures.loading import load_model, load_tokenizer, why_not_loadable
from shape_moe.architectures.placement import computing_device, placement
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.flags import DeviceFlags
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.evaluation.bench import Bench
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from support.data import write_lines
from support.held_out import task_set
from support.notes import Notes
from support.selections import random_selection


@pytest.fixture
def half_on_disk(tmp_path) -> str:
    """The second and fourth layer of the embedded model on disk."""
    outside = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    places = dict.fromkeys(outside, "cpu") | {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(4)}
    file = tmp_path / "map.json"
    file.write_text(json.dumps(places))
    return f"map:{file}"


def test_the_trace_is_the_same(embedded, half_on_disk, tmp_path) -> None:
    source = str(write_lines(tmp_path / "data.jsonl", examples("sorting", 5, seed=1)))
    asked = {"dtype": "float32", "answers": AnswerOptions(batch_size=3)}
    told = Notes()
    trace(embedded, ExampleOptions(DataOptions(source), device=half_on_disk, **asked), tmp_path / "a", progress=told)
    trace(embedded, ExampleOptions(DataOptions(source), device="cpu", **asked), tmp_path / "b")
    ours, theirs = (load_file(tmp_path / name / "statistics.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():  # the last bits depend on how weights lie in memory
        scale = np.abs(values).max()
        np.testing.assert_allclose(ours[name], values, rtol=0, atol=1e-5 * scale if values.dtype.kind == "f" else 0)
    assert "The whole model is held where --device-map puts its parts." in told.said


@pytest.mark.parametrize("routing", ["drop", "reroute"])
def test_selections_are_judged_alike(routing, embedded, half_on_disk) -> None:
    snapshot = open_snapshot(embedded)
    selection, held_out = (
        random_selection(snapshot, routing, "ragged"),
        task_set(load_tokenizer(embedded), "sorting", 6),
    )
    found = []
    for device in (half_on_disk, "cpu"):
        model = load_model(snapshot, device=device, dtype="float32")
        assert any(parameter.is_meta for parameter in model.parameters()) == (device != "cpu")
        with Bench(model, None, held_out) as bench:
            found.append((bench.dense_sums.to_items(), bench.sums(selection).to_items()))
    for ours, theirs in zip(*found, strict=True):  # the last bits depend on how weights lie in memory
        for name in ("tokens", "agree", "exact"):
            assert ours[name] == theirs[name]
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-4)


def test_what_a_map_means(half_on_disk, tmp_path) -> None:
    assert placement("map:auto") == {"device_map": "auto"}
    assert placement("cpu") == {}
    assert placement(half_on_disk)["device_map"]["model.layers.3"] == "disk"
    assert why_not_loadable(10**15, half_on_disk) is None  # it lies where the user puts it
    with pytest.raises(UsageError, match="--stream has one of them in memory"):
        computing_device(half_on_disk)
    with pytest.raises(UsageError, match="one of auto, balanced.*cannot be read"):
        placement(f"map:{tmp_path / 'none.json'}")
    for content, complaint in (("{", "no JSON"), ("[]", "something else"), ('{"": 1.5}', "puts  on 1.5")):
        file = tmp_path / "bad.json"
        file.write_text(content)
        with pytest.raises(UsageError, match=complaint):
            placement(f"map:{file}")


def test_the_flag_is_a_device(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert DeviceFlags(device_map="auto").place == "map:auto"
    assert DeviceFlags(device_map="m.json").place == f"map:{tmp_path / 'm.json'}"
    assert DeviceFlags(device="cuda:1").place == "cuda:1"
    with pytest.raises(UsageError, match="leave one out"):
        _ = DeviceFlags(device="cpu", device_map="auto").place
