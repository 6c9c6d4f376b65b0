"""Other ways to serve: MXFP4 experts, checkpoints for stock vLLM, and what stock vLLM must not serve."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.pruning.masks import masked
from shape_moe.serving.vllm import overrides
from support.engines import (
    assert_same_answers,
    engine_options,
    environment,
    needs_vllm,
    run_engine,
    start_engine,
    stock_environment,
    stock_python,
)
from support.mxfp4 import save_mxfp4_model
from support.selections import random_selection
from support.served_models import CHANGES
from support.tiny_models import make_model, save_model

pytestmark = [needs_vllm, pytest.mark.timeout(900)]
NO_MXFP4 = "No MXFP4 MoE backend supports the deployment configuration"
"""What stock vLLM says of gpt-oss where it has no kernel for this processor (an x86-64 without AMX, for one)."""
QUICK = PruneOptions(device="cpu", check_logits=False)


def test_mxfp4_experts_answer_like_experts_set_to_zero(tmp_path) -> None:
    """Held against stock vLLM, because Transformers computes MXFP4 in another precision.

    Under routing drop, the masked original is the original whose dropped experts are all zeros. What goes into the
    engine is compared on any processor, in ``tests/serving/test_vllm_plan.py``.
    """
    original = save_mxfp4_model(tmp_path / "original", **CHANGES["gpt_oss"])
    selection = random_selection(open_snapshot(original), "drop", "ragged")
    zeroed = save_mxfp4_model(tmp_path / "zeroed", **CHANGES["gpt_oss"])
    tensors = load_file(zeroed / "model.safetensors")
    for layer, kept in selection.layers.items():
        dropped = sorted(set(range(selection.num_experts)) - set(kept))
        for name in [n for n in tensors if n.startswith(f"model.layers.{layer}.mlp.experts.")]:
            if not name.endswith("_scales"):
                tensors[name][dropped] = 0
    save_file(tensors, zeroed / "model.safetensors", metadata={"format": "pt"})
    options = {**engine_options("gpt_oss"), "dtype": "bfloat16"}
    (tmp_path / "stock").mkdir()
    expected = run_engine(tmp_path / "stock", zeroed, options, refusal=NO_MXFP4, VLLM_PLUGINS="")
    result = run_engine(tmp_path, original, {**options, "hf_overrides": overrides(original, selection)})
    assert [a["tokens"] for a in result.answers] == [a["tokens"] for a in expected.answers]
    for ours, theirs in zip(result.answers, expected.answers, strict=True):
        assert (torch.tensor(ours["logprobs"]) - torch.tensor(theirs["logprobs"])).abs().max() <= 1e-4
    before, after = expected.experts[0], result.experts[0]
    assert before.keys() == after.keys()
    for name, (shape, size) in after.items():
        kept = len(selection.layers[int(name.split(".")[2])])
        assert shape == [kept, *before[name][0][1:]]
        assert size * selection.num_experts == before[name][1] * kept


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """The interpreter of an environment with the same vLLM and without this package."""
    return stock_python(tmp_path_factory.mktemp("stock"))


def found(python: str | Path, variables: dict[str, str]) -> tuple[bool, bool]:
    """Whether an interpreter can import this package, and whether its vLLM would find the plugin."""
    code = (
        "import json, importlib.metadata as m, importlib.util as u; import vllm.plugins as p\n"
        "plugins = [plugin.name for plugin in m.entry_points(group=p.DEFAULT_PLUGINS_GROUP)]\n"
        "print('found', json.dumps([u.find_spec('shape_moe') is not None, 'shape-moe' in plugins]))"
    )
    done = subprocess.run([python, "-c", code], env=variables, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package, plugin = json.loads(done.stdout.splitlines()[-1].removeprefix("found"))
    return package, plugin


def test_stock_vllm_knows_nothing_of_this_package(stock) -> None:
    """What the tests below rest on; beside the package, the same question is answered by yes."""
    assert found(sys.executable, environment()) == (True, True)
    assert found(stock, stock_environment(environment())) == (False, False)


def test_stock_vllm_serves_a_stock_target(tmp_path, stock) -> None:
    model = make_model("qwen3_moe", **CHANGES["qwen3_moe"])
    original = save_model(model, tmp_path / "original")
    selection = random_selection(open_snapshot(original), "reroute", "equal")
    selection = replace(selection, constraints={"target": "stock"})
    prune(original, tmp_path / "out", QUICK, selection=selection)
    result = run_engine(tmp_path, tmp_path / "out", engine_options("qwen3_moe"), stock=stock)
    with masked(model, selection):
        assert_same_answers(model, result.answers)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    """A ragged checkpoint with an odd count in one layer."""
    folder = tmp_path_factory.mktemp("ragged")
    original = save_model(make_model("qwen3_moe", **CHANGES["qwen3_moe"]), folder / "original")
    selection = random_selection(open_snapshot(original), "drop", "ragged")
    prune(original, folder / "out", QUICK, selection=selection)
    return folder / "out"


@pytest.mark.parametrize("trust", [False, True])
def test_stock_vllm_refuses_a_ragged_checkpoint(tmp_path, ragged, stock, trust) -> None:
    options = {**engine_options("qwen3_moe"), "trust_remote_code": trust}
    refused = start_engine(tmp_path, ragged, options, stock=stock)
    assert refused.returncode != 0
    assert not (tmp_path / "result.json").exists()
    assert "Model architectures ['ShapeQwen3MoeForCausalLM'] are not supported" in refused.stderr


@pytest.mark.parametrize(
    ("version", "options", "message"),
    [
        ("9.9.0", [], "with vLLM 0.32.0, and this is 9.9.0"),
        ("0.32.0", ["--tensor-parallel-size", "2", "--enable-expert-parallel"], "Layer 2 keeps 9 experts"),
    ],
)
def test_the_server_refuses_in_one_sentence(ragged, version, options, message) -> None:
    code = (
        "import sys, vllm\n"
        f"vllm.__version__ = {version!r}\n"
        "from vllm.entrypoints.cli.main import main\n"
        f"sys.argv = ['vllm', 'serve', {str(ragged)!r}, '--max-model-len', '128', *{options!r}]\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
