"""``shape-moe serve``: what it hands to vLLM, and what it refuses."""

from __future__ import annotations

import json
import os

import huggingface_hub
import pytest

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.cli import serve
from shape_moe.cli.main import run
from shape_moe.serving.vllm import overrides
from support.selections import random_selection


class ReplacedError(Exception):
    """Stands for the process that ``exec`` replaces."""


@pytest.fixture
def selection(checkpoint, tmp_path):
    file = tmp_path / "selection.json"
    random_selection(open_snapshot(checkpoint("qwen3_moe")), "drop", "ragged").save(file)
    return file


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """A command ``vllm`` and the arguments that it was started with."""
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.touch(mode=0o755)
    started = []

    def replace(path: str, arguments: list[str]) -> None:
        started.append((path, arguments))
        raise ReplacedError

    monkeypatch.setattr(os, "execv", replace)
    monkeypatch.setattr("sys.executable", str(command.with_name("python")))
    monkeypatch.setattr(serve, "version", lambda _: "0.32.0")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return started


def test_it_becomes_vllm_serve(checkpoint, selection, vllm) -> None:
    model = str(checkpoint("qwen3_moe"))
    options = ["--tensor-parallel-size", "2", "--port=8001", "-O0"]
    with pytest.raises(ReplacedError):
        run(["serve", model, "--selection", str(selection), *options])
    ((path, arguments),) = vllm
    assert path.endswith("bin/vllm")
    assert arguments[:4] == [path, "serve", model, "--hf-overrides"]
    assert json.loads(arguments[4]) == overrides(model, selection)
    assert arguments[5:] == options


def test_a_revision_is_used_by_both(checkpoint, selection, vllm, monkeypatch) -> None:
    """By this package, when it reads the model, and by vLLM; the hub is played by a local model."""
    asked = []

    def downloaded(name: str, revision: str | None = None, **_: object) -> str:
        asked.append((name, revision))
        return str(checkpoint("qwen3_moe"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    with pytest.raises(ReplacedError):
        run(["serve", "some/model", "--selection", str(selection), "--revision", "v1", "--port", "1"])
    assert set(asked) == {("some/model", "v1")}
    assert vllm[0][1][5:] == ["--revision", "v1", "--port", "1"]


def test_mistakes_are_told(checkpoint, selection, vllm, monkeypatch, capsys) -> None:
    model, chosen = str(checkpoint("qwen3_moe")), ["--selection", str(selection)]
    assert run(["serve", "--port", "1", model, *chosen]) == 2
    assert "MODEL comes first" in capsys.readouterr().err
    assert run(["serve", model, *chosen, "--hf-overrides={}"]) == 2
    assert "leave it out" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert run(["serve", model, *chosen]) == 1
    assert "add shape-moe to it" in capsys.readouterr().err
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(serve, "version", lambda _: "0.9.1")
    assert run(["serve", model, *chosen]) == 1
    assert "this is 0.9.1" in capsys.readouterr().err
    other = str(checkpoint("mixtral"))
    monkeypatch.setattr(serve, "version", lambda _: "0.32.0")
    assert run(["serve", other, *chosen]) == 2
    assert "16 experts per layer" in capsys.readouterr().err
    assert not vllm


def test_without_vllm_it_says_how_to_get_it(checkpoint, selection, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["serve", str(checkpoint("qwen3_moe")), "--selection", str(selection)]) == 1
    assert "There is no vLLM here" in capsys.readouterr().err
