"""How long judging will take, from the speed of the model at hand, and how much of it fits into a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from shape_moe.architectures.loading import input_device
from shape_moe.calibration.examples import Example
from shape_moe.evaluation.dense_reference import DenseReference
from shape_moe.evaluation.forgotten import ANSWER_TOKENS
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.spread import spread_over_classes
from shape_moe.evaluation.teacher_forced import compare_with_dense, record_dense
from shape_moe.evaluation.tool_check import ANSWER_TOKENS as CALL_TOKENS
from shape_moe.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STEPS = 4
_SHRINK = 0.85
_GENERAL_PROMPT = 24
"""Tokens of a general prompt, its template included."""


@dataclass(frozen=True)
class Amounts:
    """How much is judged.

    Attributes:
        examples: examples that are scored.
        answers: free answers.
        calls: examples that are asked with their tools.
        general: general prompts.
    """

    examples: int
    answers: int
    calls: int = 0
    general: int = 0

    def scaled(self, factor: float, least: Amounts) -> Amounts:
        """A share of everything, but no less than ``least`` where there is so much."""
        mine, floor = asdict(self), asdict(least)
        return Amounts(**{name: max(min(mine[name], floor[name]), int(mine[name] * factor)) for name in mine})

    def named(self) -> list[tuple[int, str, str]]:
        """The numbers with what they count, for people: one, and several."""
        words = (
            ("example", "examples"),
            ("free answer", "free answers"),
            ("example with tools", "examples with tools"),
            ("general prompt", "general prompts"),
        )
        return [(getattr(self, f.name), *word) for f, word in zip(fields(self), words, strict=True)]


@dataclass(frozen=True)
class Speed:
    """What work takes, in seconds.

    Attributes:
        dense: per token of examples that the dense model is scored on.
        other: per token of examples that another model is scored on beside it.
        steps: per further token of answers, by how many are written at once.
    """

    dense: float
    other: float
    steps: Mapping[int, float]


def measure_speed(
    model: PreTrainedModel,
    held_out: HeldOutSet,
    rows: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time a batch of each kind of work on a loaded model, once it has warmed up.

    Args:
        model: the dense model; pruned ones take about as long.
        held_out: some of the examples.
        rows: at how many answers at once writing is timed.
        clock: gives seconds.
    """
    tokens = sum(len(example.tokens) for example in held_out.examples)
    with closing(DenseReference()) as reference:
        record_dense(model, held_out, reference)
    with closing(DenseReference()) as reference:
        began = clock()
        record_dense(model, held_out, reference)
        between = clock()
        compare_with_dense(model, held_out, reference)
        ended = clock()
    prompt = held_out.examples[0].tokens[: max(1, held_out.examples[0].prompt_length)]
    steps = {count: _seconds_per_step(model, prompt, count, held_out.pad_id, clock) for count in sorted(set(rows))}
    return Speed((between - began) / tokens, (ended - between) / tokens, steps)


def _seconds_per_step(
    model: PreTrainedModel, prompt: Sequence[int], rows: int, pad_id: int, clock: Callable[[], float]
) -> float:
    """What one more token of so many answers takes."""
    import torch

    ids = torch.tensor([list(prompt)] * rows).to(input_device(model))
    mask = torch.ones_like(ids)
    times = []
    for length in (1, 1 + _STEPS):
        began = clock()
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                min_new_tokens=length,
                max_new_tokens=length,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=pad_id,
            )
        times.append(clock() - began)
    return max(times[1] - times[0], 0.0) / _STEPS


def pilot_set(drafts: Sequence[Example], batch_size: int, pad_id: int, vocabulary: int) -> HeldOutSet:
    """A batch of examples to measure speed on; where responses are still missing, parts of prompts stand for them."""
    order = sorted(drafts, key=lambda example: (len(example.tokens), example.index))
    middle = order[len(order) // 4 :][: max(1, batch_size)]
    long_enough = [example for example in middle if len(example.tokens) > 1] or middle[:1]
    rows = [
        example if example.spans else Example.answered(i, example.where, example.tokens, (len(example.tokens) + 1) // 2)
        for i, example in enumerate(long_enough)
    ]
    return HeldOutSet("a pilot", tuple(rows), (None,) * len(rows), batch_size, pad_id, frozenset(), vocabulary)


@dataclass(frozen=True)
class Workload:
    """What judging will have to do, as far as it is known before.

    Attributes:
        drafts: the examples; responses that the dense model has yet to write are missing.
        typical: tokens of such a response.
        batch_size: examples per pass, and answers to tools and general prompts at once.
        answer_rows: free answers at once.
        most_tokens: no example is added once so many tokens are there.
        others: how many models are judged beside the dense one.
    """

    drafts: Sequence[Example]
    typical: int
    batch_size: int
    answer_rows: int
    most_tokens: int
    others: int = 1

    def seconds(self, amounts: Amounts, speed: Speed) -> float:
        """How long so much will take."""
        groups = [example.group for example in self.drafts]
        chosen = [self.drafts[i] for i in spread_over_classes(groups, range(len(groups)), amounts.examples)]
        lengths = [len(example.tokens) + (0 if _whole(example) else self.typical) for example in chosen]
        tokens = min(sum(lengths), self.most_tokens)
        models, scoring = 1 + self.others, speed.dense + self.others * speed.other
        total = tokens * scoring
        total += self._writing([self.typical] * sum(not _whole(e) for e in chosen), self.batch_size, speed)
        written = [len(e.response) or self.typical for e in chosen if not e.plain]
        some = spread_over_classes([None] * len(written), range(len(written)), amounts.answers)
        total += models * self._writing([written[i] for i in some], self.answer_rows, speed)
        prompt = sum(lengths) / max(len(lengths), 1)
        total += models * prompt * (len(some) + amounts.calls) * speed.dense
        turn = min(CALL_TOKENS, max([*(self._turn(e) for e in chosen if e.spans), 1]))
        total += models * self._writing([turn] * amounts.calls, self.batch_size, speed)
        total += models * self._writing([ANSWER_TOKENS] * amounts.general, self.batch_size, speed)
        return total + amounts.general * (_GENERAL_PROMPT + ANSWER_TOKENS) * scoring

    @staticmethod
    def _turn(example: Example) -> int:
        """Tokens of one turn of an answer."""
        return max(1, example.response_tokens // len(example.spans))

    @staticmethod
    def _writing(lengths: list[int], rows: int, speed: Speed) -> float:
        """What answers of these lengths take: a batch as long as the longest of it."""
        batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
        step = speed.steps[min(speed.steps, key=lambda count: abs(count - rows))] if batches else 0.0
        return sum(max(batch) for batch in batches) * step


def _whole(example: Example) -> bool:
    """Whether nothing is missing of an example."""
    return bool(example.spans) or example.plain


def amounts_within(
    full: Amounts, least: Amounts, limit: float | None, seconds: Callable[[Amounts], float]
) -> tuple[Amounts, float]:
    """As much as fits a time, and how long that will take.

    Args:
        full: everything that there is to do.
        least: less than this is never done, whatever it takes.
        limit: seconds, None for no limit.
        seconds: how long something takes.
    """
    factor, amounts = 1.0, full
    while limit is not None and seconds(amounts) > limit:
        factor *= _SHRINK
        smaller = full.scaled(factor, least)
        if factor < 1e-4 or (smaller == amounts and smaller == full.scaled(0.0, least)):
            break
        amounts = smaller
    return amounts, seconds(amounts)


def left_out(full: Amounts, amounts: Amounts) -> list[str]:
    """What is not done of everything, in words: ``60 of 400 examples``."""
    return [
        f"{done:,} of {counted(count, word, words)}"
        for (count, word, words), (done, *_) in zip(full.named(), amounts.named(), strict=True)
        if done < count
    ]
