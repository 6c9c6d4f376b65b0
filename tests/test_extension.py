"""The example package outside the project: installed, then traced, scored and selected by through the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import shape_moe
from shape_moe.calibration.batches import FOLDS, PADDING, batches
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.progress import SILENT
from shape_moe.selection.selection import load_selection
from shape_moe.tracing.trace import load_trace
from support.data import write_lines
from support.naive_trace import capture, expert_output
from support.tiny_models import moe_block

PACKAGE = Path(__file__).parents[1] / "examples" / "extension"


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder that holds the package as an installer leaves it: its modules, its metadata, its entry points."""
    site = tmp_path / "site"
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    shutil.copytree(PACKAGE / "shape_moe_extension", site / "shape_moe_extension")
    info = site / f"shape_moe_extension-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in e.items()) for group, e in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


def run(installed: Path, *arguments: object) -> str:
    paths = [str(installed), str(Path(shape_moe.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "shape_moe", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def naive_opposed(model, todo) -> np.ndarray:
    """``sum_t g max(0, -<E_i, h + y>)`` [layer, class, cell, fold, expert], one token at a time in float64."""
    found = np.zeros((4, 1, 4, FOLDS, 32))
    for batch in todo:
        for layer, seen in capture(model, batch).items():
            experts = moe_block(model.model.layers[layer]).experts
            cells = batch.cells.tolist()
            for token in np.flatnonzero(batch.segments.numpy() != PADDING):
                ids, g = seen.ids[token].tolist(), seen.gates[token].double()
                outputs = [expert_output(experts, i, seen.hidden[token]) for i in ids]
                y = sum(weight * output for weight, output in zip(g, outputs, strict=True))
                for i, weight, output in zip(ids, g, outputs, strict=True):
                    place = (layer, 0, cells[token], int(batch.folds[token]), i)
                    found[place] += float(weight) * max(0.0, -float(output @ (seen.residual[token].double() + y)))
    return found


def test_a_statistic_a_scorer_and_a_rule_of_another_package(installed, embedded, embedded_model, tmp_path) -> None:
    data = write_lines(tmp_path / "tasks.jsonl", [*examples("sorting", 6, seed=1), *examples("words", 4, seed=2)])
    run(
        installed,
        "trace",
        embedded,
        "--data",
        data,
        "-o",
        tmp_path / "trace",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--stratify",
        "none",
    )
    trace = load_trace(tmp_path / "trace")  # here the package is not installed

    options = ExampleOptions(DataOptions(str(data), label=""), device="cpu", dtype="float32")
    made = ModelSession.open(embedded, options, None, SILENT).calibrator.run(pytest.fail, None)
    naive = naive_opposed(embedded_model[0], list(batches(made, options.answers.batch_size, 0)))
    assert (naive.sum(axis=(1, 2, 3, 4)) > 0).all()
    np.testing.assert_allclose(trace.statistics["opposed"], naive, rtol=1e-4, atol=1e-5 * naive.max())

    chosen = tmp_path / "chosen.json"
    flags = ("--keep", "0.6", "--scorer", "unopposed", "--rule", "top-half-first", "-o", chosen)
    run(installed, "select", tmp_path / "trace", *flags)
    values = trace.sums("gated_norm") / (1 + trace.sums("opposed"))
    order = np.argsort(-values, axis=1)
    better = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(better, order[:, :16], values=True, axis=1)
    rest = np.sort(values[~better])[::-1]
    expected = better | (values >= rest[77 - 64 - 1])  # 0.6 of 128 experts are 77, of which the better halves are 64
    assert expected.sum() == 77
    np.testing.assert_array_equal(load_selection(chosen).mask(), expected)
    assert "unopposed" in run(installed, "score", tmp_path / "trace", "--list")
