"""A vLLM engine that traces: its coalitions and counts are those of the Transformers tracer."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.errors import UsageError
from shape_moe.jobs.select import select
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.scoring.scores import score_trace
from shape_moe.tracing.trace import load_trace
from support.data import write_lines
from support.engines import environment, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


def test_counts_equal_those_of_transformers(tmp_path, embedded) -> None:
    """Prompts with and without a response, two tensor-parallel ranks: the engine answers as the model does."""
    rows = [row for task in TASKS for row in examples(task, 8, seed=5)]
    for row in rows[::3]:
        del row["response"]
    rows.append({"text": "".join(chr(33 + (7 * i) % 90) for i in range(512))})  # fills the context
    file = write_lines(tmp_path / "tasks.jsonl", rows)
    command = [
        sys.executable,
        "-m",
        "shape_moe",
        "trace",
        str(embedded),
        "--data",
        str(file),
        "-o",
        str(tmp_path / "t"),
    ]
    engine = ["--engine", "vllm", "--engine-arg", "tensor_parallel_size=2"]
    done = subprocess.run(
        [*command, *engine, "--dtype", "float32", "--max-new-tokens", "40", "--json"],
        env=environment(2),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == len(rows)
    found = load_trace(tmp_path / "t")
    assert found.info.engine == "vllm"
    answers = AnswerOptions(max_new_tokens=40)
    expected = trace(embedded, ExampleOptions(DataOptions(str(file)), answers=answers, device="cpu", dtype="float32"))
    assert found.info.tokens == expected.info.tokens
    for layer, table in expected.coalitions.items():
        np.testing.assert_array_equal(found.coalitions[layer].members, table.members)
        np.testing.assert_array_equal(found.coalitions[layer].counts, table.counts)
    assert set(found.statistics) == {"tokens", "layer_tokens"}
    for name, values in found.statistics.items():
        np.testing.assert_array_equal(values, expected.statistics[name])
    assert select(found, 0.6).layers == select(expected, 0.6).layers
    with pytest.raises(UsageError, match="a trace made by vllm does not hold"):
        score_trace(found, "reap")
