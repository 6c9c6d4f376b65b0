"""Free answers where tools are offered: does the pruned model still call them as the dense one does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shape_moe.calibration.records import Record
from shape_moe.calibration.responses import greedy_answers, pad_token_id
from shape_moe.evaluation.outcomes import FREE_ANSWERS
from shape_moe.evaluation.spread import spread_over_classes
from shape_moe.evaluation.tool_call_formats import Calls, Tools, calls_of_message, parse_calls
from shape_moe.evaluation.tool_calls import ToolExample
from shape_moe.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shape_moe.calibration.examples import Tokeniser

ANSWER_TOKENS = 256
"""Answers are cut off after so many tokens; a call that is cut off cannot be read."""


@dataclass(frozen=True)
class ToolPrompt:
    """A conversation up to a turn of the assistant, with the tools that it may call there.

    Attributes:
        position: the example's position in its set.
        record: what is asked; its last message is not the assistant's.
        tools: the functions offered.
        reference: the calls of the data's turn, None where the data has none.
    """

    position: int
    record: Record
    tools: Tools
    reference: Calls | None


def tool_prompts(records: Sequence[Record], most: int = FREE_ANSWERS) -> list[ToolPrompt]:
    """What to ask of records that offer tools, at most ``most`` of them, spread over the classes.

    Each is asked at the first turn of the assistant that calls a tool, else at the last one.
    """
    offering = [i for i, record in enumerate(records) if tools_of(record)]
    chosen = spread_over_classes([record.group for record in records], offering, most)
    return [_prompt(i, records[i]) for i in chosen]


def calls_tools(record: Record) -> bool:
    """Whether any turn of the assistant calls a tool."""
    return any(calls_of_message(message) for message in record.messages or () if message["role"] == "assistant")


def tools_of(record: Record) -> Tools:
    """The functions that a record offers."""
    return record.tools or ()


def _prompt(position: int, record: Record) -> ToolPrompt:
    messages = record.messages or ()
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return ToolPrompt(position, record, tools_of(record), None)
    turn = next((i for i in turns if calls_of_message(messages[i])), turns[-1])
    asked = replace(record, messages=messages[:turn])
    return ToolPrompt(position, asked, tools_of(record), calls_of_message(messages[turn]))


class ToolCheck:
    """The dense model's answers where tools are offered, and other models' beside them.

    Args:
        model: the dense model; it answers at once.
        tokeniser: turns records into prompts.
        prompts: what to ask.
        batch_size: prompts per batch.
        advance: called with the number of prompts answered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokeniser: Tokeniser,
        prompts: Sequence[ToolPrompt],
        *,
        batch_size: int = 8,
        advance: Advance = lambda _: None,
    ) -> None:
        self.tokeniser, self.prompts, self.batch_size = tokeniser, list(prompts), batch_size
        self.dense = self._answers(model, advance)

    def compare(self, model: PreTrainedModel, advance: Advance = lambda _: None) -> dict[int, ToolExample]:
        """What both models do, by the example's position in its set."""
        made = self._answers(model, advance)
        pairs = zip(self.prompts, self.dense, made, strict=True)
        return {p.position: ToolExample(p.tools, p.reference, dense, pruned) for p, dense, pruned in pairs}

    def _answers(self, model: PreTrainedModel, advance: Advance) -> list[Calls]:
        asked = {i: self.tokeniser.prompt(prompt.record) for i, prompt in enumerate(self.prompts)}
        room = {i: self.tokeniser.room(len(tokens), ANSWER_TOKENS) for i, tokens in asked.items()}
        made: dict[int, list[int]] = {}
        pad_id = pad_token_id(model, self.tokeniser)
        for batch in greedy_answers(model, asked, room, batch_size=self.batch_size, pad_id=pad_id):
            made |= batch
            advance(len(batch))
        decode = self.tokeniser.tokenizer.decode
        texts = [str(decode(made[i], skip_special_tokens=False)) for i in range(len(self.prompts))]
        return [parse_calls(text, prompt.tools) for text, prompt in zip(texts, self.prompts, strict=True)]
