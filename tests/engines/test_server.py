"""The embedded model under a real ``vllm serve``, asked as clients ask."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from shape_moe.demo.embedded import EVALUATION_SEED, exact_match
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.verify import verify
from shape_moe.pruning.masks import masked
from support.engines import needs_vllm, server
from support.selections import seven_of_eight

pytestmark = [needs_vllm, pytest.mark.timeout(900)]
COUNT = 25
NAME = "served"


def served_exact_match(address: str) -> dict[str, float]:
    """Exact match of greedy answers by task, as the OpenAI client gets them."""
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none")
    scores = {}
    for task in TASKS:
        records = examples(task, COUNT, seed=EVALUATION_SEED, held_out=True)
        answers = client.completions.create(
            model=NAME, prompt=[record["prompt"] for record in records], temperature=0, max_tokens=64, stop=["\n"]
        )
        texts = [choice.text for choice in sorted(answers.choices, key=lambda choice: choice.index)]
        right = [text + "\n" == record["response"] for text, record in zip(texts, records, strict=True)]
        scores[task] = sum(right) / COUNT
    return scores


def test_task_accuracy_is_that_of_transformers(tmp_path, embedded, embedded_model) -> None:
    selection = seven_of_eight()
    model, tokenizer = embedded_model
    with masked(model, selection):
        expected = exact_match(model, tokenizer, count=COUNT)
    assert 0 < min(expected.values()) < max(expected.values())
    prune(embedded, tmp_path / "out", PruneOptions(device="cpu", dtype="float32"), selection=selection)
    vllm = str(Path(sys.executable).with_name("vllm"))
    small = ["--dtype", "float32", "--max-model-len", "256", "--served-model-name", NAME]
    with server([vllm, "serve", str(tmp_path / "out"), *small], tmp_path / "log.txt") as address:
        assert served_exact_match(address) == expected
        checks = {check.name: check for check in verify(tmp_path / "out", endpoint=address)}
        assert all(check.passed for check in checks.values()), checks
        assert "top-1 agreement 100 %" in checks["endpoint's canary"].detail


def test_the_dense_model_under_the_pruned_name_is_caught(tmp_path, embedded) -> None:
    """Another vocabulary of the server's tokenizer as well: both checks fail, each for its reason."""
    prune(embedded, tmp_path / "out", PruneOptions(device="cpu", dtype="float32"), selection=seven_of_eight())
    tokenizer = shutil.copytree(embedded, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    document = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tokenizer / "tokenizer.json").write_text(json.dumps(document))
    vllm = str(Path(sys.executable).with_name("vllm"))
    small = ["--dtype", "float32", "--max-model-len", "256", "--served-model-name", NAME, "--enforce-eager"]
    command = [vllm, "serve", str(embedded), *small, "--tokenizer", str(tokenizer)]
    with server(command, tmp_path / "log.txt") as address:
        checks = {check.name: check for check in verify(tmp_path / "out", endpoint=address)}
    assert checks["endpoint's canary"].passed is False
    assert checks["endpoint's tokens"].passed is False
    assert checks["files"].passed is True
