"""A disk that is full: one sentence from every verb that writes, and nothing half-written under a final name."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from shape_moe.cli.main import run
from shape_moe.demo.tasks import examples
from shape_moe.selection.selection import load_selection
from support.data import write_lines
from support.gguf_files import chats, gguf_model, save_gguf

FEW = ("--device", "cpu", "--generate", "1", "--samples", "20")
LIMIT = 256
"""Bytes that a file may have: less than any result."""


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond :data:`LIMIT`, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def made(embedded, tmp_path_factory) -> Path:
    """A folder with what the verbs read: data, a trace, a selection, an experiment's file."""
    home = tmp_path_factory.mktemp("made")
    write_lines(home / "data.jsonl", examples("sorting", 60, seed=1))
    traced = ["trace", str(embedded), "--data", str(home / "data.jsonl"), "-o", str(home / "t"), "--device", "cpu"]
    assert run([*traced, "--samples", "20", "-q"]) == 0
    assert run(["select", str(home / "t"), "--keep", "0.6", "-o", str(home / "s.json"), "-q"]) == 0
    assert run(["convert", str(home / "s.json"), "-o", str(home / "foreign.json"), "-q"]) == 0
    grid = {
        "models": ["embedded"],
        "calibration": {"sorting": {"data": "data.jsonl", "samples": 10}},
        "methods": ["shape/coverage"],
        "keep": [0.6],
        "evaluation": {"sorting": {"data": "data.jsonl", "samples": 10, "metrics": ["kl"]}},
    }
    (home / "grid.yaml").write_text(yaml.safe_dump(grid))
    return home


def commands(model: Path, made: Path, out: Path) -> dict[str, tuple[object, ...]]:
    data, traced = made / "data.jsonl", made / "t"
    return {
        "trace": ("trace", model, "--data", data, "-o", out, "--samples", 20, "--device", "cpu"),
        "trace layer by layer": (
            "trace",
            model,
            "--data",
            data,
            "-o",
            out,
            "--samples",
            20,
            "--device",
            "cpu",
            "--stream",
        ),
        "measure": ("measure", model, "--trace", traced, "--data", data, "-o", out, "--samples", 4, "--device", "cpu"),
        "merge": ("merge", traced, traced, "-o", out),
        "select": ("select", traced, "--keep", 0.6, "-o", out),
        "score": ("score", traced, "--csv", out),
        "report": ("report", traced, "-o", out),
        "convert": ("convert", traced, "-o", out),
        "convert back": ("convert", made / "foreign.json", "--model", model, "-o", out),
        "prune": ("prune", model, "--trace", traced, "--keep", 0.6, "-o", out, "--scorer", "shape", "--no-logits"),
        "sweep": ("sweep", model, "--data", data, "--keep", 0.6, "-o", out, "--held-out-samples", 10, *FEW),
        "evaluate": ("evaluate", model, "--data", data, "-o", out, "--no-footprint", "--no-general", *FEW),
        "experiment": ("experiment", made / "grid.yaml", "-o", out),
        "demo": ("demo", "-o", out),
    }


@pytest.mark.parametrize("verb", commands(Path(), Path(), Path()))
def test_every_verb_says_so_in_one_sentence(call, embedded, made, tmp_path, verb) -> None:
    out = tmp_path / "out"
    with full_disk():
        code, printed, err = call(*commands(embedded, made, out)[verb])
    assert code == 1, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("Error: The disk of ")
    assert " is full" in last
    assert "Traceback" not in err
    assert printed == ""
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"out.partial", "out.passes"}
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_the_same_command_goes_on_when_there_is_space(call, embedded, made, tmp_path) -> None:
    command = commands(embedded, made, tmp_path / "out")["prune"]
    with full_disk():
        assert call(*command)[0] == 1
    code, _, err = call(*command)
    assert code == 0, err
    assert load_selection(tmp_path / "out").kept == 77
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_gguf_file_that_does_not_fit(call, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    file = save_gguf(gguf_model("qwen3_moe"), tmp_path / "in" / "m.gguf")
    data = write_lines(tmp_path / "in" / "data.jsonl", chats(6))
    out = tmp_path / "out"
    out.mkdir()
    command = ("prune", file, "--data", data, "--keep", 0.75, "-o", out / "a.gguf", "--device", "cpu", "--no-judge")
    with full_disk():
        code, printed, err = call(*command, "--no-logits")
    assert (code, printed) == (1, "")
    assert err.strip().splitlines()[-1].startswith("Error: The disk of ")
    assert "Traceback" not in err
    assert {path.name for path in out.iterdir()} <= {"a.shape.partial"}
    assert call(*command, "--no-logits")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.gguf", "a.shape"]
