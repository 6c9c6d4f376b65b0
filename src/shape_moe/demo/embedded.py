"""How well a model does the six tasks of the embedded model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from shape_moe.architectures.loading import input_device
from shape_moe.calibration.batches import RESPONSE, make_batch
from shape_moe.calibration.examples import Example
from shape_moe.demo.tasks import TASKS, examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVALUATION_SEED = 20_260_609


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str] = tuple(TASKS),
    *,
    count: int = 100,
    seed: int = EVALUATION_SEED,
) -> dict[str, float]:
    """Exact match on held-out prompts, by task, as a share.

    One teacher-forced pass decides it: every token of the answer is the most likely one given the right ones before
    it exactly when greedy generation gives the answer.

    Args:
        model: the model to judge.
        tokenizer: its tokenizer.
        tasks: names of tasks.
        count: prompts per task.
        seed: draws the prompts.
    """
    import torch

    scores = {}
    for task in tasks:
        rows = []
        for i, record in enumerate(examples(task, count, seed=seed, held_out=True)):
            prompt = tokenizer(record["prompt"]).input_ids
            answer = tokenizer(record["response"], add_special_tokens=False).input_ids
            rows.append(Example.answered(i, task, (*prompt, *answer), len(prompt)))
        batch = make_batch(rows, range(count), pad_id=0)
        device = input_device(model)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), use_cache=False
            ).logits
        guesses = logits[:, :-1].argmax(-1).cpu()
        wanted = (batch.segments.view(batch.input_ids.shape) == RESPONSE)[:, 1:]
        right = (guesses == batch.input_ids[:, 1:]) | ~wanted
        scores[task] = right.all(dim=1).double().mean().item()
    return scores
