"""At which turn of a conversation tools are offered."""

from __future__ import annotations

from typing import Any

from shape_moe.calibration.records import Record
from shape_moe.evaluation.tool_call_formats import ToolCall
from shape_moe.evaluation.tool_check import calls_tools, tool_prompts

TOOLS: tuple[dict[str, Any], ...] = ({"type": "function", "function": {"name": "look", "parameters": {}}},)
ASK = {"role": "user", "content": "Where?"}
SAY = {"role": "assistant", "content": "There."}
ONE, TWO = (
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": at}}}]}
    for at in (1, 2)
)
TOLD = {"role": "tool", "content": "7"}


def record(*messages: dict[str, Any], tools: Any = TOOLS, group: str | None = None) -> Record:
    return Record(0, "r", messages=messages, tools=tools, group=group)


def test_the_first_turn_that_calls_is_asked_else_the_last_one() -> None:
    calling, talking = record(ASK, SAY, ASK, ONE, TOLD, TWO, SAY), record(ASK, SAY, ASK, SAY, ASK)
    open_one, without = record(ASK), record(ASK, ONE, tools=None)
    found = tool_prompts([without, calling, talking, open_one])
    assert [prompt.position for prompt in found] == [1, 2, 3]
    assert [prompt.record.messages for prompt in found] == [(ASK, SAY, ASK), (ASK, SAY, ASK), (ASK,)]
    assert [prompt.reference for prompt in found] == [(ToolCall("look", {"at": 1}),), (), None]
    assert all(prompt.tools == TOOLS for prompt in found)
    assert [calls_tools(one) for one in (calling, talking, open_one, without)] == [True, False, False, True]


def test_calls_of_others_than_the_assistant_are_none() -> None:
    assert not calls_tools(record({**ONE, "role": "user"}, SAY))
    assert not calls_tools(Record(0, "r", prompt="look(1)", response="look(2)"))


def test_prompts_are_spread_over_the_classes() -> None:
    records = [record(ASK, ONE, group=group) for group in "aaaabbbb"]
    assert [prompt.position for prompt in tool_prompts(records, 4)] == [0, 2, 4, 6]
    assert len(tool_prompts(records * 9)) == 32
