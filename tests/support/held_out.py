"""Held-out sets for tests."""

from __future__ import annotations

from shape_moe.calibration.examples import Example
from shape_moe.demo.tasks import examples
from shape_moe.evaluation.held_out_set import HeldOutSet
from support.data import make_examples


def random_set(count: int = 9, batch_size: int = 4, seed: int = 0) -> HeldOutSet:
    """Random tokens: examples with responses, one plain text and one text of a single token."""
    rows = make_examples(count, seed=seed)
    text = rows[0].tokens
    rows += [Example(count, "plain", text, plain=True), Example(count + 1, "single", (5,), plain=True)]
    groups = tuple("odd" if i % 2 else "even" for i in range(len(rows)))
    return HeldOutSet("random", tuple(rows), groups, batch_size, 0, frozenset([2]))


def task_set(tokenizer, task: str = "addition", count: int = 40, seed: int = 11) -> HeldOutSet:
    """Held-out examples of one of the embedded model's tasks."""
    rows = []
    for i, record in enumerate(examples(task, count, seed=seed, held_out=True)):
        prompt = tokenizer(record["prompt"]).input_ids
        answer = tokenizer(record["response"], add_special_tokens=False).input_ids
        rows.append(Example.answered(i, f"{task} {i}", (*prompt, *answer), len(prompt)))
    stops = frozenset(tokenizer("\n", add_special_tokens=False).input_ids)
    return HeldOutSet(task, tuple(rows), tuple([task] * count), 16, 0, stops)
