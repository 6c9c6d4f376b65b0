"""GGUF files on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shape_moe.jobs.inspect import inspect_model
from support.cli import refused
from support.data import write_lines
from support.gguf_files import chats, gguf_model, save_gguf


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", chats(12)))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(gguf_model("qwen3_moe"), tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_one_command_prunes_a_file(file: Path, data: str, tmp_path: Path, call) -> None:
    before, out = file.read_bytes(), tmp_path / "smaller.gguf"
    code, said, notes = call(
        "prune", file, "--data", data, "--keep", "0.75", "-o", out, "--no-general", "--device", "cpu", "--json"
    )
    assert code == 0, notes
    assert file.read_bytes() == before
    told = json.loads(said)
    assert told["checkpoint"] == str(out)
    assert told["logits"]["mean_kl"] < 1e-9
    assert told["judgement"]["verdict"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smaller.gguf", "smaller.shape"]
    assert inspect_model(out).size.num_experts == told["kept"] == 36
    assert out.stat().st_size < len(before)


def test_several_keep_rates_make_a_series(file: Path, data: str, tmp_path: Path, call) -> None:
    start = ("prune", file, "--data", data, "--no-judge", "--no-logits", "--device", "cpu")
    code, said, notes = call(*start, "--keep", "85%,0.75,60%", "-o", tmp_path / "small.gguf", "--json")
    assert code == 0, notes
    told = json.loads(said)
    assert told["series"] == str(tmp_path / "small")
    names = [f"small-{keep}.gguf" for keep in (0.85, 0.75, 0.6)]
    assert [model["checkpoint"] for model in told["models"]] == [str(tmp_path / "small" / name) for name in names]
    assert [inspect_model(tmp_path / "small" / name).size.num_experts for name in names] == [39, 36, 27]
    code, said, _ = call(*start, "--keep", "0.5,0.25", "-o", tmp_path / "other")
    assert code == 0
    assert [line.split()[0] for line in said.splitlines() if line.startswith("other-")] == [
        "other-0.5.gguf",
        "other-0.25.gguf",
    ]
    after = said.splitlines()[said.splitlines().index("Next:") + 1 :]
    assert after
    assert all(line.startswith("  shape-moe ") for line in after)
    refused(call(*start, "--keep", "0.5,0.5", "-o", tmp_path / "x"), 2, "given twice")
    refused(call(*start, "--keep", "0.5,x", "-o", tmp_path / "x"), 2, "not 'x'")
    refused(call(*start, "--keep", "0.5,85", "-o", tmp_path / "x"), 2, "not 85")
    refused(call(*start, "--keep", "0.5,0.25", "--tolerance", "1%", "-o", tmp_path / "x"), 2, "--tolerance")


def test_places_that_are_taken_or_do_not_fit(file: Path, data: str, tmp_path: Path, embedded: Path, call) -> None:
    start = ("prune", file, "--data", data, "--keep", "0.75", "--no-judge", "--no-logits", "--device", "cpu", "-o")
    refused(call(*start, tmp_path / "folder"), 2, "name one, as --output folder.gguf")
    refused(call("prune", embedded, *start[2:], tmp_path / "x.gguf"), 2, "pruned into a folder")
    refused(call(*start, file, "--force"), 2, "is an input")
    (tmp_path / "taken.gguf").write_text("mine")
    refused(call(*start, tmp_path / "taken.gguf"), 2, "exists")
    assert (tmp_path / "taken.gguf").read_text() == "mine"
    refused(call(*start, tmp_path / "r.gguf", "--target", "ragged"), 2, "--target stock")
    assert call(*start, tmp_path / "taken.gguf", "--force")[0] == 0
    assert inspect_model(tmp_path / "taken.gguf").size.num_experts == 36


def test_a_pruned_file_is_verified_evaluated_and_reported(file: Path, data: str, tmp_path: Path, call) -> None:
    out, page = tmp_path / "small.gguf", tmp_path / "report.html"
    run = ("--device", "cpu")
    assert call("prune", file, "--data", data, "--keep", "75%", "-o", out, "--no-general", *run)[0] == 0
    assert call("verify", out, "--original", file, *run)[0] == 0
    code, said, notes = call(
        "evaluate", file, out, "--data", data, "--samples", "8", "-o", tmp_path / "e.json", "--no-footprint", *run
    )
    assert code == 0, notes
    assert "small.gguf" in said
    assert call("report", out, "-o", page)[0] == 0
    assert "small.gguf" in page.read_text()
    assert call("report", tmp_path / "small.shape", "-o", tmp_path / "again.html")[0] == 0
    card = (tmp_path / "small.shape" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "llama-server -m" in card
    assert "from_pretrained" not in card
    (tmp_path / "small.shape").rename(tmp_path / "gone")
    refused(call("report", out, "-o", tmp_path / "x.html"), 2, "which pruning left beside it")
