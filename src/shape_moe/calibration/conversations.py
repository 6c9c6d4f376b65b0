"""Messages, tool calls and tools of every common spelling, in ours: that of the OpenAI chat API."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shape_moe.calibration.schema import ROLES, Message, parse_json
from shape_moe.errors import DataError

_ROLE_NAMES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")
"""Roles of messages whose text is the JSON of one call, or of several."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_READ = {
    *("role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", "refusal"),
    *_THOUGHTS,
}
_SILENT = {"id", "index", "timestamp", "created_at", "model", "token_count", "type", "uuid"}
"""Keys of messages that say nothing about the conversation."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "file")


def thoughts_of(row: Mapping[str, Any]) -> str | None:
    """The reasoning in a row or message, under any of its names."""
    for name in _THOUGHTS:
        if isinstance(row.get(name), str) and row[name].strip():
            return str(row[name])
    return None


def read_messages(value: Any, where: str, unread: Callable[[str], object] = lambda _: None) -> list[Message]:
    """A conversation from a list of messages, a dictionary of lists, or the JSON text of either.

    Args:
        value: the conversation.
        where: for messages.
        unread: told the name of every key that means something and is not read.

    Raises:
        DataError: for what is no conversation, and for one with pictures or sound.
    """
    if isinstance(value, str):
        value = parse_json(value, f"{where}, messages as JSON text")
    if isinstance(value, Mapping):
        value = _rows_of_columns(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
        raise DataError(f"{where}: messages must be a list of at least one message.")
    return [_message(message, where, unread) for message in value]


def looks_like_messages(value: Any) -> bool:
    """Whether a value is a conversation, or the JSON text of one."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return False
        try:
            value = parse_json(value, "")
        except DataError:
            return False
    if isinstance(value, Mapping):
        return "role" in value or "from" in value
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(isinstance(entry, Mapping) and ("role" in entry or "from" in entry) for entry in value)
    )


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tools from a list or JSON text, each as ``{"type": "function", "function": {...}}``; None where there are none.

    Raises:
        DataError: for what is no list of tools.
    """
    if isinstance(value, str):
        value = parse_json(value, f"{where}, tools as JSON text") if value.strip() else None
    if value is None or (isinstance(value, Sequence) and not len(value)):
        return None
    if isinstance(value, Mapping):
        value = [value]
    tools = []
    for entry in value if isinstance(value, Sequence) else [value]:
        tool = parse_json(entry, f"{where}, a tool as JSON text") if isinstance(entry, str) else entry
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function", tool), Mapping):
            raise DataError(f"{where}: tools must be a list of functions, each a JSON object, or JSON text of that.")
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tools


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls from one call, a list of calls, or JSON text of either.

    Raises:
        DataError: for what is no call.
    """
    if isinstance(value, str):
        value = parse_json(value, f"{where}, a tool call as JSON text")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{where}: tool calls must be a list, not {type(value).__name__}.")
    return [_call(entry, where) for entry in value]


def _message(message: Any, where: str, unread: Callable[[str], object]) -> Message:
    if not isinstance(message, Mapping) or not isinstance(role := message.get("role", message.get("from")), str):
        raise DataError(f"{where}: every message needs a role, one of {', '.join(ROLES)}.")
    if any(message.get(name) for name in _MEDIA):
        raise DataError(f"{where}: the record has pictures or sound; only text can be traced.")
    for key, value in message.items():
        if key not in _READ and key not in _SILENT and value not in (None, [], {}, ""):
            unread(f"{key} of messages")
    content, thought = _content(message.get("content", message.get("value")), where)
    calls = message.get("tool_calls") or message.get("function_call")
    if role.lower() in _CALLS:
        role, calls, content = "assistant", content, None
    found = {
        "role": _role(role, where),
        "content": message.get("refusal") if content is None else content,
        "tool_calls": read_calls(calls, where) if calls else None,
        "reasoning_content": thoughts_of(message) or thought,
        **{name: str(message[name]) for name in ("tool_call_id", "name") if message.get(name) is not None},
    }
    if found["role"] != "tool" and not any((found["content"] is not None, calls, found["reasoning_content"])):
        raise DataError(f"{where}: every message needs a content that is text, or a tool call.")
    return {key: value for key, value in found.items() if value is not None or key == "content"}


def _role(name: str, where: str) -> str:
    role = _ROLE_NAMES.get(name.lower())
    if role is None:
        raise DataError(f"{where}: every message needs a role, one of {', '.join(ROLES)}, and {name!r} is none.")
    return role


def _content(content: Any, where: str) -> tuple[str | None, str | None]:
    """Text and thoughts of a message; parts of text are lines, as servers join them."""
    if content is None or isinstance(content, str):
        return content, None
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise DataError(f"{where}: every message needs a content that is text, or a list of parts that are.")
    texts, thoughts = [], []
    for part in content:
        kind = "text" if isinstance(part, str) else str(part.get("type", "text")) if isinstance(part, Mapping) else ""
        text = part if isinstance(part, str) else part.get(kind, part.get("text")) if kind else None
        if kind in _THOUGHT_PARTS and isinstance(text, str):
            thoughts.append(text)
        elif isinstance(part, str) or (kind in _TEXT_PARTS and isinstance(part.get("text"), str)):
            texts.append(part if isinstance(part, str) else part["text"])
        else:
            raise DataError(
                f"{where}: a message has a part of type {kind or type(part).__name__!r}; only text is read."
            )
    return ("\n".join(texts) if texts else None), ("\n".join(thoughts) or None)


def _call(call: Any, where: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = parse_json(call, f"{where}, a tool call as JSON text")
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where}: a tool call needs the name of a function.")
    found: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": _arguments(function.get("arguments", function.get("parameters")), where),
        },
    }
    if call.get("id") is not None:
        found["id"] = str(call["id"])
    return found


def _arguments(arguments: Any, where: str) -> dict[str, Any] | str:
    """Arguments as a mapping; as the text that they are where that is no JSON object."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if isinstance(arguments, str):
        try:
            value = parse_json(arguments, where)
        except DataError:
            return arguments
        return value if isinstance(value, dict) else arguments
    return json.dumps(arguments)


def _rows_of_columns(columns: Mapping[str, Any]) -> Any:
    """A single message as a list of one; a dictionary of lists, as older datasets hold lists of messages, as rows."""
    if isinstance(columns.get("role", columns.get("from")), str):
        return [columns]
    lists = {key: value for key, value in columns.items() if isinstance(value, list)}
    if not lists or len({len(value) for value in lists.values()}) != 1:
        return None
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
