"""A grid judged in a real vLLM: one engine, selections as masks, the answers of the masked model in Transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import shape_moe
from support.engines import environment, needs_vllm
from support.served_grid import write_grid

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


def test_free_answers_are_those_of_transformers(tmp_path) -> None:
    grid = write_grid(tmp_path, generate=24, keep=[0.2])
    expected = shape_moe.experiment(grid, tmp_path / "transformers").document
    command = [sys.executable, "-m", "shape_moe", "experiment", str(grid), "-o", str(tmp_path / "vllm"), "--json"]
    done = subprocess.run(
        [*command, "--engine", "vllm"], env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    figures = [
        [document["dense"][0]["sets"], *(cell["sets"] for cell in document["cells"])] for document in (found, expected)
    ]
    for ours, theirs in zip(*figures, strict=True):
        for name in ("exact_match", "length", "no_end_rate"):
            assert ours["sorts"]["generation"][name] == theirs["sorts"]["generation"][name]
    assert len({sets["sorts"]["generation"]["exact_match"]["value"] for sets in figures[0]}) > 1  # masks do something
