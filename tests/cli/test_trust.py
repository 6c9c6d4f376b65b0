"""--trust-remote-code on the command line."""

from __future__ import annotations

from shape_moe.demo.tasks import examples
from support.cli import refused
from support.data import write_lines
from support.own_code import FICKLE, with_code


def test_trusted_code_is_run_and_checked(call, embedded, tmp_path) -> None:
    folder = with_code(embedded, tmp_path / "model", FICKLE)
    data = write_lines(tmp_path / "data.jsonl", examples("sorting", 3, seed=1))
    job = ("--data", data, "--device", "cpu", "-o", tmp_path / "out")
    refused(call("trace", folder, *job, "--trust-remote-code"), 1, "gives other logits while it is traced")
    refused(call("prune", folder, *job, "--keep", "0.6", "--trust-remote-code"), 1, "gives other logits")
    code, _, said = call("trace", folder, *job)
    assert code == 0, said
    assert "Transformers' own Qwen3MoeForCausalLM is used instead" in " ".join(said.split())
