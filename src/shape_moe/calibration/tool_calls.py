"""How chat templates want tool calls: arguments as an object or text, empty content or none, ids of a kind."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shape_moe.calibration.schema import Message

_NAME, _KEY, _VALUE = "probe_of_calls", "probe_of_keys", "probe_of_values"


@dataclass(frozen=True)
class Style:
    """One way to write tool calls.

    Attributes:
        arguments: ``mapping`` or ``text``.
        empty: content of messages that only call.
        short_ids: whether ids are cut to nine letters and digits.
    """

    arguments: str
    empty: str | None
    short_ids: bool

    def shaped(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in this style."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> Message:
        found = {**message, "content": message.get("content") or (self.empty if message.get("tool_calls") else "")}
        if message.get("tool_call_id") and self.short_ids:
            found["tool_call_id"] = _short_id(message["tool_call_id"])
        if message.get("tool_calls"):
            found["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return found

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        given = call["function"]["arguments"]
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        found = {**call, "function": {**call["function"], "arguments": text if self.arguments == "text" else given}}
        if self.short_ids:
            found["id"] = _short_id(str(call.get("id", call["function"]["name"])))
        return found


STYLES = tuple(
    Style(arguments, empty, short_ids)
    for short_ids in (False, True)
    for empty in ("", None)
    for arguments in ("mapping", "text")
)
"""All of them, the most common first."""


def probe(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls of another name and other arguments, which nothing else in a conversation holds."""
    call = {"type": "function", "id": "probe1234", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
    return [
        {**message, "tool_calls": [call for _ in message["tool_calls"]]} if message.get("tool_calls") else message
        for message in messages
    ]


def calls_are_written(messages: Sequence[Message], text: str) -> bool:
    """Whether all calls of a :func:`probe` stand in a text, with arguments neither as Python nor quoted twice."""
    count = sum(len(message.get("tool_calls") or ()) for message in messages)
    if min(text.count(_NAME), text.count(_KEY), text.count(_VALUE)) < count:
        return False
    if f"'{_KEY}'" in text or f'\\"{_KEY}' in text:
        return False
    without = any(message.get("tool_calls") and message.get("content") is None for message in messages)
    return not (without and re.search(r"(?<!\w)None(?!\w)", text))


def _short_id(name: str) -> str:
    """Nine letters and digits for an id of a tool call, which some templates insist on."""
    return name if re.fullmatch(r"[A-Za-z0-9]{9}", name) else hashlib.sha256(name.encode()).hexdigest()[:9]
