"""``shape-moe experiment`` as a user types it."""

from __future__ import annotations

import json

import pytest

from support.cli import refused
from support.data import write_lines

GRID = """
models: [embedded]
calibration: {a: {data: a.jsonl}}
keep: [0.5, 0.6]
evaluation: {e: {data: a.jsonl}}
"""


@pytest.fixture
def grid(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])
    file = tmp_path / "grid.yaml"
    file.write_text(GRID)
    return file


def test_a_dry_run_counts(call, grid):
    code, out, _ = call("experiment", grid, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out) == {"models": 1, "traces": 1, "selections": 2, "cells": 2}
    code, out, _ = call("experiment", grid, "--dry-run", "--only", "keep=0.5")
    assert code == 0
    assert "1 selections, 1 cells" in out


def test_the_command_refuses_in_one_sentence(call, grid, tmp_path):
    refused(call("experiment", tmp_path / "none.yaml"), 2, "There is no file")
    refused(call("experiment", grid, "--only", "keep"), 2, "AXIS=NAME")
    refused(call("experiment", grid), 2, "names no output")
    refused(call("experiment", grid, "-o", tmp_path / "out"), 1, "Calibration has seen every example")
    grid.write_text(GRID + "sed: 1\n")
    refused(call("experiment", grid), 2, "grid.yaml: sed is not a key")
    assert not (tmp_path / "out").exists()
