"""Free-running answers, and whether they are healthy: teacher-forced figures pass models that break when they write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shape_moe.calibration.responses import greedy_answers
from shape_moe.errors import DataError, UsageError
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.spread import spread_over_classes
from shape_moe.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_REPEATS = 4
_LOOP_TOKENS = 16
_SPARE = 1.25


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are made and judged.

    Attributes:
        examples: answer at most this many examples, of every class as many, spread evenly over each.
        max_new_tokens: upper limit of an answer's length; None allows a quarter more than the longest response.
        answer_pattern: regular expression whose last match (its first group, where it has one) is the answer proper,
            in responses and in what the model writes; None compares whole answers.

    Raises:
        UsageError: for a pattern that is no regular expression, and for numbers below 1.
    """

    examples: int = 64
    max_new_tokens: int | None = None
    answer_pattern: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("generated examples", self.examples), ("max-new-tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"The number of {name} must be at least 1, not {value}.")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise UsageError(f"--answer-pattern is not a regular expression: {error}.") from error


@dataclass(frozen=True)
class Generated:
    """Free-running answers of a model.

    Attributes:
        positions: the examples that were answered.
        answers: their tokens, the one that ends them included.
        limit: the most tokens that an answer could have.
        ended: whether the model ended the answer itself.
        looped: whether the answer ends in a repetition, see :func:`ends_in_loop`.
        exact: whether its text is the response's (or its answer the response's answer).
    """

    positions: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    limit: int
    ended: NDArray[np.bool_]
    looped: NDArray[np.bool_]
    exact: NDArray[np.bool_]

    @property
    def lengths(self) -> NDArray[np.float64]:
        """Tokens of each answer."""
        return np.array([len(answer) for answer in self.answers], dtype=np.float64)


@dataclass(frozen=True)
class Asked:
    """What models are asked to answer freely.

    Attributes:
        held_out: the set.
        options: how answers are judged.
        prompts: tokens of the prompts by position in the set.
        limit: the most tokens of an answer.
    """

    held_out: HeldOutSet
    options: GenerationOptions
    prompts: dict[int, tuple[int, ...]]
    limit: int

    @classmethod
    def of(cls, held_out: HeldOutSet, options: GenerationOptions | None = None) -> Asked:
        """The prompts of a set that are answered.

        Raises:
            DataError: when no example has both a prompt and a response.
        """
        options = options or GenerationOptions()
        positions = spread_over_classes(held_out.groups, held_out.answered(), options.examples)
        if not positions:
            raise DataError(f"{held_out.name} has no example with a prompt and a response to generate from.")
        prompts = {i: tuple(held_out.examples[i].tokens[: held_out.examples[i].prompt_length]) for i in positions}
        return cls(held_out, options, prompts, answer_limit(held_out, options))

    def judged(self, tokenizer: PreTrainedTokenizerBase, answers: Mapping[int, Sequence[int]]) -> Generated:
        """Answers beside the responses.

        Args:
            tokenizer: turns answers into text.
            answers: tokens by position, the one that ends an answer included.
        """
        stops, judge = self.held_out.stops, _Judge(tokenizer, self.options.answer_pattern)
        written = [tuple(answers[i]) for i in self.prompts]
        return Generated(
            positions=tuple(self.prompts),
            answers=tuple(written),
            limit=self.limit,
            ended=np.array([bool(answer) and answer[-1] in stops for answer in written]),
            looped=np.array([ends_in_loop(answer) for answer in written]),
            exact=np.array([judge.same(answers[i], self.held_out.response(i)) for i in self.prompts]),
        )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOutSet,
    options: GenerationOptions | None = None,
    advance: Advance = lambda _: None,
) -> Generated:
    """Let a model answer the prompts of a set greedily.

    Raises:
        DataError: when no example has both a prompt and a response.
    """
    asked = Asked.of(held_out, options)
    answers: dict[int, list[int]] = {}
    size = held_out.rows_of(asked.limit + max(len(prompt) for prompt in asked.prompts.values()))
    room = dict.fromkeys(asked.prompts, asked.limit)
    for batch in greedy_answers(model, asked.prompts, room, batch_size=size, pad_id=held_out.pad_id):
        answers |= batch
        advance(len(batch))
    return asked.judged(tokenizer, answers)


def answer_limit(held_out: HeldOutSet, options: GenerationOptions) -> int:
    """The most tokens of an answer: a quarter more than the longest response, unless the options say."""
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    return longest_answer(max(len(held_out.response(i)) for i in held_out.answered()))


def longest_answer(longest: int) -> int:
    """The most tokens of an answer, where the longest response has so many."""
    return int(longest * _SPARE) + _LOOP_TOKENS


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether an answer ends in four or more copies of the same tokens, together at least 16 of them."""
    for period in range(1, len(tokens) // _REPEATS + 1):
        needed = max(_REPEATS * period, _LOOP_TOKENS)
        if needed <= len(tokens) and all(tokens[-i] == tokens[-i - period] for i in range(1, needed - period + 1)):
            return True
    return False


def answer_proper(text: str, pattern: str | re.Pattern[str] | None) -> str | None:
    """What of an answer must be right: the last match of a pattern (its first group, where it has one), else all of it.

    Runs of whitespace are one space. None where the pattern matches nothing.
    """
    if pattern is None:
        return " ".join(text.split())
    compiled = re.compile(pattern)
    found = list(compiled.finditer(text))
    return " ".join((found[-1][1 if compiled.groups else 0] or "").split()) if found else None


class _Judge:
    """Compares answers by their text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pattern: str | None) -> None:
        self.tokenizer, self.pattern = tokenizer, re.compile(pattern) if pattern else None

    def same(self, answer: Sequence[int], response: Sequence[int]) -> bool:
        """Whether two answers say the same."""
        wanted = self._proper(response)
        return wanted is not None and self._proper(answer) == wanted

    def _proper(self, tokens: Sequence[int]) -> str | None:
        return answer_proper(str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)), self.pattern)
