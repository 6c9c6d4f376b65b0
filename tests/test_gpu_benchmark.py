"""The measurement for GPUs, on small models of the same families and without a GPU."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from benchmarks.gpu import __main__ as measurement
from benchmarks.gpu.routing import nested_sets, scale_routers, set_survival, surviving_slots
from benchmarks.gpu.shapes import SHAPES
from transformers import AutoModelForCausalLM

from shape_moe.architectures.sites import find_sites, live_moe_config


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_model_is_measured_dense_and_pruned(shape, tmp_path, monkeypatch) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["gpu", "--tiny", "--device", "cpu", "--only", shape.name, "--output", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(measurement, "REPEATS", 1)
    searched = []
    monkeypatch.setattr(measurement, "set_survival", lambda *given: searched.append(1) or set_survival(*given))
    measurement.main()
    assert len(searched) == 1
    rows = json.loads(out.read_text())["results"][shape.name]["rows"]
    assert set(rows) == {"tracing_overhead", "1 dense", "0.8 drop", "0.8 reroute", "0.6 drop", "0.6 reroute"}
    dense = rows["1 dense"]["weight_bytes"]
    assert dense > rows["0.8 drop"]["weight_bytes"] > rows["0.6 drop"]["weight_bytes"]
    assert rows["0.6 reroute"]["weight_bytes"] <= rows["0.6 drop"]["weight_bytes"]
    for row in rows.values():
        assert all(value is None or value > 0 for value in row.values())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_wanted_number_of_slots_survives(shape) -> None:
    model = measurement.build(shape, measurement.Machine("cpu"), tiny=True)
    moe = live_moe_config(model)
    layers = [site.layer for site in find_sites(model)]
    kept = nested_sets(moe.num_experts, layers, [0.8, 0.6])
    for keep, sets in kept.items():
        assert sum(map(len, sets.values())) / (moe.num_experts * len(layers)) == pytest.approx(keep, abs=0.03)
    ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(1))
    wanted = {0.8: 7.94 / 8 * moe.top_k, 0.6: 7.53 / 8 * moe.top_k}
    set_survival(model, ids, kept, wanted, moe.top_k)
    for keep, slots in wanted.items():
        selection = measurement.select(model, kept[keep], keep, "drop")
        assert surviving_slots(model, ids, selection, moe.top_k) == pytest.approx(slots, abs=0.2 * moe.top_k / 8)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_routers_are_set_once_and_the_same_again_in_the_next_build(shape) -> None:
    first, second = (measurement.build(shape, measurement.Machine("cpu"), tiny=True) for _ in range(2))
    moe, before = live_moe_config(first), routers(first)
    ids = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(1))
    kept = nested_sets(moe.num_experts, list(before), [0.8, 0.6])
    wanted = {0.8: 7.94 / 8 * moe.top_k, 0.6: 7.53 / 8 * moe.top_k}
    scale_routers(second, set_survival(first, ids, kept, wanted, moe.top_k))
    after, again = routers(first), routers(second)
    for layer, weight in before.items():
        assert not torch.equal(after[layer], weight)
        assert torch.equal(after[layer], again[layer])


def routers(model) -> dict[int, torch.Tensor]:
    """A copy of every router's weight."""
    return {site.layer: site.router.weight.detach().clone() for site in find_sites(model)}


def test_the_true_shapes_have_the_published_sizes() -> None:
    billions = {"Qwen3-30B-A3B": 30.5, "gpt-oss-20b": 20.9, "DeepSeek-V2-Lite": 15.7}
    for shape in SHAPES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape.build())
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count / 1e9 == pytest.approx(billions[shape.name], rel=0.01)
