"""lm-evaluation-harness through its vLLM backend: what is served scores as the mask does in Transformers."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shape_moe.demo.embedded import exact_match
from shape_moe.evaluation.harness import TaskOptions, run_tasks
from shape_moe.evaluation.task_results import TaskResult
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.pruning.masks import masked
from support.engines import environment, needs_vllm
from support.harness_tasks import COUNT, write_tasks
from support.selections import seven_of_eight

pytestmark = [
    needs_vllm,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.timeout(900),
]
RUN = Path(__file__).with_name("run_tasks.py")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[str]:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    return [str(folder / "addition.yaml"), str(folder / "choice.yaml")]


@pytest.fixture(scope="module")
def expected(embedded_model, tasks) -> dict[str, TaskResult]:
    """What the masked original scores in Transformers."""
    model, tokenizer = embedded_model
    with masked(model, seven_of_eight()):
        found = run_tasks(model, tokenizer, TaskOptions(tuple(tasks)), batch_size=50)
        share = exact_match(model, tokenizer, ["addition"], count=COUNT)["addition"]
    assert found["embedded_addition"].metrics["exact_match"].value == pytest.approx(share)
    assert 0 < share < 1
    return found


def run(folder: Path, path: Path, tasks: list[str], selection: Path | None = None) -> dict[str, Any]:
    """The tasks in a process of their own; nothing but results may reach stdout."""
    engine_args = {"dtype": "float32", "max_model_len": 256}
    job = {"path": str(path), "tasks": tasks, "engine_args": engine_args}
    (folder / "job.json").write_text(json.dumps({**job, "selection": str(selection) if selection else None}))
    done = subprocess.run(
        [sys.executable, RUN, folder / "job.json", folder / "result.json"],
        env=environment(HF_DATASETS_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return json.loads((folder / "result.json").read_text())


def assert_same(found: dict[str, Any], expected: dict[str, TaskResult]) -> None:
    """The same items, and the same score at each of them."""
    assert set(found) == set(expected)
    for task, result in expected.items():
        assert tuple(found[task]["item_hashes"]) == result.item_hashes
        assert {name: tuple(scores) for name, scores in found[task]["scores"].items()} == result.scores


def test_the_command_of_lm_eval_scores_a_pruned_checkpoint_as_the_mask(tmp_path, embedded, tasks, expected) -> None:
    """With no flag that the dense model would not need."""
    prune(embedded, tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=seven_of_eight())
    command = [
        Path(sys.executable).with_name("lm_eval"),
        *("--model", "vllm", "--model_args", f"pretrained={tmp_path / 'out'},dtype=float32,max_model_len=256"),
        *("--tasks", ",".join(expected), "--include_path", Path(tasks[0]).parent),
        *("--output_path", tmp_path / "results", "--batch_size", "auto"),
    ]
    variables = environment(HF_DATASETS_OFFLINE="1")
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    # At times vLLM's own shutdown aborts lm_eval after it has written everything; what was written is judged.
    aborted = done.returncode == -signal.SIGABRT and "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted, done.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    for task, result in expected.items():
        for metric, estimate in result.metrics.items():
            assert found[task][f"{metric},none"] == pytest.approx(estimate.value), task


def test_the_original_with_a_selection_scores_as_the_mask(tmp_path, embedded, tasks, expected) -> None:
    seven_of_eight().save(tmp_path / "selection.json")
    found = run(tmp_path, embedded, tasks, tmp_path / "selection.json")
    assert_same(found, expected)
