"""What the command says of quantised models: which method, what happens to it, and why one cannot be used."""

from __future__ import annotations

import json

from transformers import AutoTokenizer

from support.cli import refused
from support.data import write_lines
from support.quantised import save_quantised


def test_the_method_and_what_becomes_of_it_are_said(call, embedded, tmp_path) -> None:
    folder = tmp_path / "model"
    save_quantised(folder, "awq")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
    code, out, _ = call("inspect", str(folder))
    assert code == 0
    assert "Quantised: AWQ 4-bit, groups of 8\n" in out
    code, out, _ = call("inspect", str(folder), "--json")
    assert json.loads(out)["quantisation"] == "AWQ 4-bit, groups of 8"

    data = write_lines(tmp_path / "data.jsonl", [{"text": "abcd"}, {"text": "efgh"}])
    options = ["--data", str(data), "-o", str(tmp_path / "trace"), "--device", "cpu"]
    code, _, err = call("trace", str(folder), *options)
    assert code == 0, err
    assert "AWQ 4-bit, groups of 8: dequantised to float32 to be run here." in " ".join(err.split())


def test_what_cannot_be_dequantised_is_said_in_one_sentence(call, embedded, tmp_path) -> None:
    folder = tmp_path / "model"
    save_quantised(folder, "awq")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (folder / "config.json").write_text(json.dumps(config))
    code, out, _ = call("inspect", str(folder))
    assert code == 0
    assert "not dequantised here: AWQ 4-bit, groups of 8 of version 'gemv' is laid out in a way that" in " ".join(
        out.split()
    )
    data = write_lines(tmp_path / "data.jsonl", [{"text": "abcd"}])
    result = call("trace", str(folder), "--data", str(data), "-o", str(tmp_path / "trace"), "--device", "cpu")
    refused(result, 1, "AWQ 4-bit, groups of 8 of version 'gemv'", "--trace")
