"""The embedded model under a real ``vllm serve``, asked as clients ask."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shape_moe.demo.embedded import EVALUATION_SEED, exact_match
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.jobs.options import PruneOptions
from shape_moe.jobs.prune import prune
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from support.engines import needs_vllm, server

pytestmark = [needs_vllm, pytest.mark.timeout(900)]
COUNT = 25
NAME = "served"


@pytest.fixture(scope="module")
def selection() -> Selection:
    """Seven of eight experts: the model still knows some tasks, and forgets others."""
    layers = {layer: [expert for expert in range(32) if (expert + layer) % 8] for layer in range(4)}
    layers[0] = layers[0][:-1]
    return Selection(None, None, "qwen3_moe", "random", "uniform", "drop", 32, 4, layers, 0.875)


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


def test_task_accuracy_is_that_of_transformers(tmp_path, embedded, selection) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()
    with masked(model, selection):
        expected = exact_match(model, AutoTokenizer.from_pretrained(embedded), count=COUNT)
    assert 0 < min(expected.values()) < max(expected.values())
    prune(embedded, tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=selection)
    vllm = str(Path(sys.executable).with_name("vllm"))
    small = ["--dtype", "float32", "--max-model-len", "256", "--served-model-name", NAME]
    with server([vllm, "serve", str(tmp_path / "out"), *small], tmp_path / "log.txt") as address:
        assert served_exact_match(address) == expected
