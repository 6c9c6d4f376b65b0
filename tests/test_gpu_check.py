"""``make test-gpu`` where there is no GPU, and what it writes where there is one."""

from __future__ import annotations

import json

import torch
from benchmarks.gpu import check

from shape_moe.demo.doctor import Diagnosis, Finding


def test_without_cuda_it_says_so_and_ends_well(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["--output", str(tmp_path / "gpu.json")]) == 0
    assert "sees no CUDA device here" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_with_cuda_the_card_and_every_check_are_written(tmp_path, monkeypatch) -> None:
    findings = [Finding("trace", True, "fine", 1.0)]
    asked = []

    def diagnose(device: str) -> Diagnosis:
        asked.append(device)
        return Diagnosis({}, {}, {}, {}, {"cuda:0": "Card X"}, device, tuple(findings))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(check, "diagnose", diagnose)
    monkeypatch.setattr(check, "vllm_plugin", lambda: {"result": "passed"})
    file = tmp_path / "gpu.json"
    assert check.main(["--output", str(file)]) == 0
    told = json.loads(file.read_text())
    assert (told["card"], told["capability"], told["passed"]) == ("Card X", "9.0", True)
    assert told["findings"] == [{"name": "trace", "passed": True, "detail": "fine", "seconds": 1.0}]
    assert len(told["date"]) == len("2026-01-01")
    assert asked == ["cuda"]
    monkeypatch.setattr(check, "vllm_plugin", lambda: {"result": "failed"})
    assert check.main(["--output", str(file)]) == 1
    monkeypatch.setattr(check, "vllm_plugin", lambda: {"result": "not run"})
    findings.append(Finding("stream", False, "differs"))
    assert check.main(["--output", str(file)]) == 1
