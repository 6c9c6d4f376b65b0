"""The plugin's own logic, without vLLM: what it reads, what it lets through, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import FingerprintError, ServingError, UnsupportedModelError, UsageError
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.pruning.modeling_shape_moe import pruned_class
from shape_moe.serving.vllm import overrides
from shape_moe.serving.vllm.building import layer_index
from shape_moe.serving.vllm.families import VLLM_FAMILIES, architectures
from shape_moe.serving.vllm.kernel_configs import falling_back
from shape_moe.serving.vllm.plan import expert_count, read_plan
from shape_moe.serving.vllm.startup import ANY_VERSION, TESTED_VERSIONS, check_startup, check_version
from shape_moe.serving.vllm.weights import kept_weights, load_kept
from support.fp8 import save_fp8_model
from support.mxfp4 import save_mxfp4_model
from support.selections import random_selection
from support.tiny_models import FAMILIES as TINY
from support.tiny_models import make_config


def served_config(checkpoint, family: str, routing: str = "drop", **changes: Any) -> Any:
    """The configuration as vLLM sees it when the original is served with a random selection."""
    snapshot = open_snapshot(checkpoint(family))
    settings = overrides(snapshot.path, random_selection(snapshot, routing, "ragged"))
    return make_config(family, **{**settings, **changes})


def vllm_config(config: Any, *, lora: Any = None, **parallel: Any) -> Any:
    """As much of vLLM's configuration as the checks read."""
    defaults = {
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "enable_eplb": False,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config),
        parallel_config=SimpleNamespace(**{**defaults, **parallel}),
        lora_config=lora,
    )


def test_the_entry_point_is_installed_and_light() -> None:
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "shape-moe"]
    assert found.value == "shape_moe.serving.vllm:register"
    code = (
        "import sys, shape_moe.serving.vllm as plugin\n"
        "assert callable(plugin.register) and callable(plugin.overrides)\n"
        "print([name for name in ('torch', 'transformers', 'vllm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_families_are_served_under_their_pruned_names(checkpoint) -> None:
    assert VLLM_FAMILIES.keys() == set(TINY) & FAMILIES.keys() - {"granitemoe"}
    assert architectures()["ShapeQwen3MoeForCausalLM"] == "qwen3_moe"
    assert len(architectures()) == len(VLLM_FAMILIES)
    snapshot = open_snapshot(checkpoint("granitemoe"))
    with pytest.raises(UnsupportedModelError, match="does not serve granitemoe; it serves deepseek_v2"):
        overrides(snapshot.path, random_selection(snapshot, "drop", "ragged"))


@pytest.mark.parametrize("family", [name for name in TINY if name != "granitemoe"])
@pytest.mark.parametrize("routing", ["drop", "reroute"])
def test_kept_weights_are_those_of_the_pruned_checkpoint(checkpoint, tmp_path, family, routing) -> None:
    snapshot = open_snapshot(checkpoint(family))
    selection = random_selection(snapshot, routing, "ragged")
    prune(snapshot.path, tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=selection)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    plan = read_plan(make_config(family, **overrides(snapshot.path, selection)))
    extra = {f"model.layers.{plan.num_layers}.{name}": torch.zeros(1) for name in ("mlp.experts.0.x", "norm.weight")}
    found = dict(kept_weights([*load_file(snapshot.path / "model.safetensors").items(), *extra.items()], plan))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("routing", ["drop", "reroute"])
@pytest.mark.parametrize("save", [save_mxfp4_model, save_fp8_model])
def test_quantised_weights_are_those_of_the_pruned_checkpoint(tmp_path, save, routing) -> None:
    """Blocks and scales alike, on any processor: vLLM's own MXFP4 kernels for CPUs need AMX."""
    original = save(tmp_path / "original")
    selection = random_selection(open_snapshot(original), routing, "ragged")
    prune(original, tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=selection)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    config = SimpleNamespace(**json.loads((original / "config.json").read_text()))
    config.__dict__.update(overrides(original, selection))
    plan, found, counts = read_plan(config), {}, {}

    def load(weights: Any) -> set[str]:
        given = dict(weights)
        found.update(given)
        counts.update(dict.fromkeys(given, getattr(config, "num_local_experts", None)))
        return set(given)

    assert load_kept(load, load_file(original / "model.safetensors").items(), plan, config) == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (found[name], tensor))), name
        if name.endswith(("_blocks", "_scales")):
            assert counts[name] == len(tensor) == len(selection.layers[int(name.split(".")[2])])


def test_overrides_change_what_a_pruned_checkpoint_changes(checkpoint, tmp_path) -> None:
    snapshot = open_snapshot(checkpoint("deepseek_v3"))
    selection = random_selection(snapshot, "reroute", "ragged")
    selection.save(tmp_path / "selection.json")
    settings = overrides(snapshot.path, tmp_path / "selection.json")
    assert settings == overrides(snapshot.path, selection) == json.loads(json.dumps(settings))
    assert settings["architectures"] == ["ShapeDeepseekV3ForCausalLM"]
    assert settings["shape_pruning"]["source"] == "original"
    assert settings.keys() <= {"architectures", "shape_pruning", "num_nextn_predict_layers"}


def test_overrides_refuse_a_selection_of_another_model(checkpoint) -> None:
    snapshot = open_snapshot(checkpoint("olmoe"))
    other = random_selection(open_snapshot(checkpoint("mixtral")), "drop", "ragged")
    with pytest.raises(UsageError, match="8 experts per layer"):
        overrides(snapshot.path, other)
    fitting = random_selection(snapshot, "drop", "ragged")
    object.__setattr__(fitting, "fingerprint", "sha256:" + "0" * 64)
    with pytest.raises(FingerprintError, match="another model"):
        overrides(snapshot.path, fitting)


@pytest.mark.parametrize(("routing", "rows"), [("drop", 16), ("reroute", 8)])
def test_the_plan_counts_experts_and_router_rows(checkpoint, routing, rows) -> None:
    config = served_config(checkpoint, "qwen3_moe", routing)
    plan = read_plan(config)
    assert plan.from_original
    assert (plan.kept(0), plan.router_rows(0)) == (8, rows)
    assert (plan.kept(1), plan.router_rows(1)) == (16, 16)  # a dense layer is in no selection
    with expert_count(plan, config, 5):
        assert config.num_experts == 5
    assert config.num_experts == 16


def test_unknown_descriptions_are_refused(checkpoint) -> None:
    good = served_config(checkpoint, "qwen3_moe").shape_pruning
    with pytest.raises(ServingError, match="no shape_pruning"):
        read_plan(make_config("qwen3_moe"))
    for change in ({"version": 3}, {"gate_scale": "other"}, {"routing": "other"}, {"source": "elsewhere"}):
        with pytest.raises(ServingError, match="newer format"):
            read_plan(make_config("qwen3_moe", shape_pruning={**good, **change}))
    with pytest.raises(ServingError, match="must agree"):
        read_plan(make_config("qwen3_moe", shape_pruning=good, num_experts=12))


def test_packed_rows_are_loaded_layer_by_layer(checkpoint) -> None:
    config = served_config(checkpoint, "gpt_oss")
    plan = read_plan(config)
    seen = []

    def load(weights: Any) -> set[str]:
        names = set()
        for name, tensor in weights:
            seen.append((name, tensor.shape[0], config.num_local_experts))
            names.add(name)
        return names

    weights = load_file(checkpoint("gpt_oss") / "model.safetensors")
    assert load_kept(load, weights.items(), plan, config) == weights.keys()
    packed = [row for row in seen if ".experts." in row[0]]
    assert len({rows for _, rows, _ in packed}) == 3
    assert all(rows == count for _, rows, count in packed)
    assert config.num_local_experts == 8


def test_unknown_versions_are_refused_by_name(monkeypatch) -> None:
    for version in TESTED_VERSIONS:
        check_version(version)
        check_version(f"{version}+cpu")
    with pytest.raises(ServingError, match=rf"{TESTED_VERSIONS[0]}, and this is 9.9.*{ANY_VERSION}=1"):
        check_version("9.9")
    monkeypatch.setenv(ANY_VERSION, "1")
    check_version("9.9")


def test_settings_that_would_serve_another_model_are_refused(checkpoint) -> None:
    config = served_config(checkpoint, "qwen3_moe")
    plan = read_plan(config)
    check_startup(plan, vllm_config(config, tensor_parallel_size=2))
    check_startup(plan, vllm_config(config, tensor_parallel_size=3))
    with pytest.raises(ServingError, match="--enable-eplb"):
        check_startup(plan, vllm_config(config, enable_eplb=True))
    with pytest.raises(ServingError, match="LoRA"):
        check_startup(plan, vllm_config(config, lora=object()))
    with pytest.raises(ServingError, match="24 wide"):
        check_startup(plan, vllm_config(config, tensor_parallel_size=5))
    with pytest.raises(ServingError, match=r"Layer 2 keeps 9 experts.*--multiple-of 2"):
        check_startup(plan, vllm_config(config, tensor_parallel_size=2, enable_expert_parallel=True))


def test_groups_that_vllm_would_ignore_are_refused(checkpoint) -> None:
    config = served_config(checkpoint, "deepseek_v3", "reroute")
    plan = read_plan(config)
    check_startup(plan, vllm_config(config))
    layer, ids = next(iter(plan.layers.items()))
    for count in (len(ids) - 1, config.n_group):
        pruning = config.shape_pruning
        broken = {**pruning, "layers": {**pruning["layers"], str(layer): list(range(count))}}
        with pytest.raises(ServingError, match=rf"Layer {layer} keeps {count} experts for 4 router groups"):
            check_startup(read_plan(make_config("deepseek_v3", shape_pruning=broken)), vllm_config(config))
    dropping = served_config(checkpoint, "deepseek_v3", "drop")
    check_startup(read_plan(dropping), vllm_config(dropping))  # the router stays whole


def test_servers_without_the_plugin_cannot_build_a_pruned_model(monkeypatch) -> None:
    """vLLM builds foreign models of Transformers around its own kernels if the class says that it may."""
    served = pruned_class(Qwen3MoeForCausalLM)
    assert Qwen3MoeForCausalLM.is_backend_compatible()
    assert not served.is_backend_compatible()
    assert served._can_set_attn_implementation()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    assert not served._can_set_attn_implementation()


def test_layers_are_found_in_names() -> None:
    assert layer_index("model.layers.11.mlp.experts") == 11
    assert layer_index("layers.3") == 3
    with pytest.raises(ServingError, match="names no decoder layer"):
        layer_index("model.mtp.0.mlp")


def test_the_dense_models_kernel_configuration_comes_second() -> None:
    tuned = {128: "dense", 96: "own"}
    asked = []

    def lookup(count: int, *rest: Any) -> str | None:
        asked.append((count, *rest))
        return tuned.get(count)

    find = falling_back(lookup)
    find.shape_moe_counts |= {77: 128, 96: 128}
    assert [find(count, 768, None) for count in (128, 96, 77, 50)] == ["dense", "own", "dense", None]
    assert find(77, 768, dtype=None, block_n=128) == "dense"
    assert asked[-1] == (128, 768, None, 128)
