"""Of the calibration set nothing travels: no eight tokens of it stand in any file that is written, traces apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from shape_moe.architectures.loading import load_tokenizer
from shape_moe.cli.main import run
from shape_moe.demo.tasks import examples
from support.data import write_lines
from support.gguf_files import chats, gguf_model, save_gguf
from support.leaks import leaks

HERE = ("--device", "cpu", "-q")
FEW = ("--no-general", "--no-footprint", "--generate", "4")


def call(*words: object) -> None:
    assert run([str(word) for word in words]) == 0


def texts_of(row: dict) -> list[str]:
    """What a record says."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row["prompt"], row["response"], row["prompt"] + row["response"]]


def sequences(tokenizer, rows: list[dict]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for row in rows for text in texts_of(row)]


@pytest.fixture(scope="module")
def written(embedded, tmp_path_factory) -> Path:
    """A folder with what every verb writes of one calibration set."""
    home = tmp_path_factory.mktemp("written")
    data = write_lines(home / "data.jsonl", examples("addition", 24, seed=1))
    held = write_lines(home / "held.jsonl", examples("addition", 12, seed=2))
    out = home / "out"
    out.mkdir()
    call("trace", embedded, "--data", data, "-o", out / "t", *HERE)
    call("measure", embedded, "--trace", out / "t", "--data", data, "-o", out / "curves.json", *HERE)
    call("select", out / "t", "--keep", 0.6, "-o", out / "s.json", "-q")
    call("score", out / "t", "--csv", out / "values.csv", "-q")
    call("evaluate", embedded, out / "s.json", "--data", data, "-o", out / "e.json", *FEW, *HERE)
    call("sweep", embedded, "--trace", out / "t", "--held-out", held, "--keep", 0.6, "-o", out / "sweep", *HERE)
    call("report", out / "t", out / "e.json", out / "sweep", "-o", out / "report.html", "-q")
    call("convert", out / "t", "-o", out / "counts.json", "-q")
    return home


def test_no_file_of_a_verb_holds_calibration_text(written, embedded) -> None:
    rows = examples("addition", 24, seed=1) + examples("addition", 12, seed=2)
    tokenizer = load_tokenizer(embedded)
    assert leaks(written / "out", sequences(tokenizer, rows), tokenizer, but=["t", "sweep/trace"]) == []
    assert [line.split(":")[0] for line in leaks(written, sequences(tokenizer, rows), tokenizer)] == [
        "data.jsonl", "held.jsonl",
    ]  # fmt: skip


def test_no_gguf_file_and_nothing_beside_it_holds_calibration_text(tmp_path) -> None:
    file = save_gguf(gguf_model("qwen3_moe"), tmp_path / "m.gguf")
    data = write_lines(tmp_path / "data.jsonl", chats(12))
    out = tmp_path / "out"
    out.mkdir()
    call("prune", file, "--data", data, "--keep", 0.75, "-o", out / "p.gguf", "--no-general", *HERE)
    call("report", out / "p.gguf", "-o", out / "report.html", "-q")
    tokenizer = load_tokenizer(file)
    told = sequences(tokenizer, chats(12))
    assert len(told) >= 24
    assert leaks(out, told, tokenizer, but=["p.shape/shape/trace"]) == []
    assert [line.split(":")[0] for line in leaks(tmp_path, told, tokenizer)] == ["data.jsonl"]
