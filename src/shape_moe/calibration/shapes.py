"""Records of every common shape, recognised by their keys and made one: what :class:`Content` declares.

A shape is a name for ``--format``, the keys that show it, the keys that it reads, and a function from a row to content
and a sentence. Whatever else in a row means something is named, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from shape_moe.calibration.conversations import (
    looks_like_messages,
    read_calls,
    read_messages,
    read_tools,
    thoughts_of,
)
from shape_moe.calibration.schema import checked
from shape_moe.errors import DataError

FIELDS = ("text", "prompt", "response", "messages", "tools")
"""Names that --map gives to fields of the data."""
_PROMPTS = ("question", "query", "input", "problem", "user")
_RESPONSES = ("response", "completion", "output", "answer", "solution", "target")
_BESIDE = ("system", "tools", "functions", "history", "reasoning_content", "reasoning", "thinking")
"""Keys beside a prompt that make a conversation of it."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Normal:
    """What a row became.

    Attributes:
        content: the fields of :class:`Content`.
        said: its shape, for people.
        unread: what of it means something and is not used.
    """

    content: dict[str, Any]
    said: str
    unread: tuple[str, ...]


class _Reading:
    """One row while it is read; remembers what was."""

    def __init__(self, row: Row, where: str) -> None:
        self.row, self.where = row, where
        self.read: set[str] = set()
        self.unread: dict[str, None] = {}

    def get(self, *names: str) -> Any:
        """The value of the first of these keys that the row has; it counts as read."""
        for name in names:
            if self.row.get(name) is not None:
                self.read.add(name)
                return self.row[name]
        return None

    def text(self, *names: str) -> tuple[str | None, str]:
        """The text of the first of these keys that the row has, and its name."""
        for name in names:
            value = self.row.get(name)
            if value is not None:
                self.read.add(name)
                if not isinstance(value, str):
                    raise DataError(f"{self.where}: field {name!r} must be text, not {type(value).__name__}.")
                return value, name
        return None, ""

    def messages(self, value: Any) -> list[dict[str, Any]]:
        return read_messages(value, self.where, self.unread.setdefault)

    def conversation(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Messages with the system prompt and the tools that stand beside them in the row."""
        system = self.row.get("system")
        if isinstance(system, str):
            self.read.add("system")
            if system.strip() and messages[0]["role"] not in ("system", "developer"):
                messages = [{"role": "system", "content": system}, *messages]
        tools = read_tools(self.get("tools", "functions"), self.where)
        return {"messages": messages, "tools": tools}

    def finish(self, content: dict[str, Any], said: str) -> Normal:
        """Check the content, and find out what was left unread."""
        for name in _MEDIA:
            if self.row.get(name):
                raise DataError(f"{self.where}: the record has pictures or sound ({name}); only text can be traced.")
        if content.get("tools"):
            said += " (with tools)"
        for name in _MEANINGFUL - self.read:
            if self.row.get(name) not in (None, "", [], {}):
                self.unread.setdefault(name)
        return Normal(checked(content, self.where), said, tuple(sorted(self.unread)))


def _messages(reading: _Reading) -> Normal:
    value = reading.get("messages")
    text = "chat messages, as JSON text" if isinstance(value, str) else "chat messages"
    messages = reading.messages(value)
    prompt = reading.row.get("prompt")
    if isinstance(prompt, str) and any(message["content"] == prompt for message in messages):
        reading.read.add("prompt")  # the question once more
    if reading.row.get("chosen") == value:
        reading.read |= {"chosen", "rejected", "prompt"}
    return reading.finish(reading.conversation(messages), text)


def _sharegpt(reading: _Reading) -> Normal:
    name = "conversations" if reading.row.get("conversations") is not None else "conversation"
    messages = reading.messages(reading.get(name))
    return reading.finish(reading.conversation(messages), f"ShareGPT records: {name} -> messages")


def _alpaca(reading: _Reading) -> Normal:
    instruction, _ = reading.text("instruction")
    more, more_name = reading.text("input", "context")
    response, response_name = reading.text(*_RESPONSES)
    prompt = f"{instruction}\n\n{more}" if more and more.strip() else str(instruction)
    said = f"Alpaca records: instruction{f' + {more_name}' if more_name else ''} -> prompt"
    said += f", {response_name} -> response" if response_name else ""
    return _asked(reading, prompt, response, "instruction", said)


def _prompt(reading: _Reading) -> Normal:
    prompt = reading.row.get("prompt")
    if reading.row.get("label") is False:
        raise DataError(f"{reading.where}: the answer is marked as a bad one (label false).")
    reading.read.add("label")
    name = next((key for key in _RESPONSES if reading.row.get(key) is not None), "")
    if prompt is not None and looks_like_messages(prompt):
        reading.read |= {"prompt", name}
        messages, answer = reading.messages(prompt), reading.row.get(name)
        said = f"conversational prompts{f' and {name}s' if name else ''} -> messages"
        return reading.finish(reading.conversation([*messages, *_turns(reading, answer)]), said)
    text, _ = reading.text("prompt")
    if name and looks_like_messages(reading.row[name]):
        reading.read.add(name)
        messages = [{"role": "user", "content": text}, *_turns(reading, reading.row[name])]
        return reading.finish(reading.conversation(messages), f"prompts and conversational {name}s -> messages")
    response, _ = reading.text(*_RESPONSES)
    said = f"prompt/{name} records" if name else "prompts without a response"
    return _asked(reading, str(text), response, "prompt", said)


def _preference(reading: _Reading) -> Normal:
    chosen, prompt = reading.get("chosen"), reading.row.get("prompt")
    reading.read |= {"rejected", "prompt"}
    said = "preference pairs: chosen is the answer, rejected is left out"
    if not looks_like_messages(chosen):
        response, _ = reading.text("chosen")
        if prompt is None:
            raise DataError(
                f"{reading.where}: the preference pair has no prompt, so what of chosen is the answer cannot be told; "
                "--map text=chosen reads it as plain text."
            )
        if looks_like_messages(prompt):
            messages = [*reading.messages(prompt), {"role": "assistant", "content": response}]
            return reading.finish(reading.conversation(messages), said)
        text, _ = reading.text("prompt")
        return _asked(reading, str(text), response, "prompt", said)
    messages = reading.messages(chosen)
    if prompt is not None and all(message["role"] in ("assistant", "tool") for message in messages):
        asked = reading.messages(prompt) if looks_like_messages(prompt) else [{"role": "user", "content": prompt}]
        messages = [*asked, *messages]
    return reading.finish(reading.conversation(messages), said)


def _calls(reading: _Reading) -> Normal:
    query, _ = reading.text("query")
    calls = read_calls(reading.get("answers"), reading.where)
    asked: dict[str, Any] = {"role": "user", "content": query}
    messages = [asked, {"role": "assistant", "content": None, "tool_calls": calls}]
    said = "function calls: query -> user message, answers -> tool calls"
    return reading.finish(reading.conversation(messages), said)


def _text(reading: _Reading) -> Normal:
    text, _ = reading.text("text")
    if not text:
        raise DataError(f"{reading.where}: field 'text' is empty.")
    return reading.finish({"text": text}, "plain text")


def _turns(reading: _Reading, answer: Any) -> list[dict[str, Any]]:
    """The answer to a conversational prompt: messages, or text."""
    if answer is None:
        return []
    if looks_like_messages(answer):
        return reading.messages(answer)
    if not isinstance(answer, str):
        raise DataError(f"{reading.where}: the answer must be text or messages, not {type(answer).__name__}.")
    return [{"role": "assistant", "content": answer}] if answer else []


def _asked(reading: _Reading, prompt: str, response: str | None, name: str, said: str) -> Normal:
    """A prompt and its response; a conversation where a system prompt, tools, turns or thoughts go with them."""
    if not prompt:
        raise DataError(f"{reading.where}: field {name!r} is empty.")
    if response is None:
        _check_misspelt(reading)
    if not any(reading.row.get(key) not in (None, "", [], {}) for key in _BESIDE):
        return reading.finish({"prompt": prompt, "response": response or None}, said)
    messages = []
    for turn in reading.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError(f"{reading.where}: history must be a list of pairs of question and answer.")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": prompt})
    thought = thoughts_of(reading.row)
    if response or thought:
        messages.append({"role": "assistant", "content": response})
        if thought:
            messages[-1]["reasoning_content"] = thought
            reading.read |= {"reasoning_content", "reasoning", "thinking"}
    return reading.finish(reading.conversation(messages), f"{said} -> messages")


def _check_misspelt(reading: _Reading) -> None:
    """Refuse a record without a response that has one under a name that is nearly right.

    Raises:
        DataError: with the name that was probably meant.
    """
    for name in reading.row.keys() - _MEANINGFUL:
        near = get_close_matches(str(name).strip().casefold(), _RESPONSES, 1, cutoff=0.82)
        if near and isinstance(reading.row[name], str):
            raise DataError(
                f"{reading.where}: the record has no response, but a field {name!r}; did you mean {near[0]!r}? "
                f"Rename it, or give --map response={name}; if it means something else, leave it out."
            )


@dataclass(frozen=True)
class Shape:
    """One shape.

    Attributes:
        name: for ``--format``.
        keys: any of these shows it.
        make: makes content of a row.
        beside: further keys that must be there.
    """

    name: str
    keys: tuple[str, ...]
    make: Callable[[_Reading], Normal]
    beside: tuple[str, ...] = ()

    def fits(self, row: Row) -> bool:
        """Whether a row has what this shape is known by."""
        return any(row.get(key) is not None for key in self.keys) and all(
            row.get(key) is not None for key in self.beside
        )


SHAPES = (
    Shape("messages", ("messages",), _messages),
    Shape("sharegpt", ("conversations", "conversation"), _sharegpt),
    Shape("preference", ("chosen",), _preference),
    Shape("alpaca", ("instruction",), _alpaca),
    Shape("calls", ("query",), _calls, ("answers",)),
    Shape("prompt", ("prompt",), _prompt),
    Shape("text", ("text",), _text),
)
FORMATS = tuple(shape.name for shape in SHAPES)
"""What ``--format`` takes."""
_MEANINGFUL = frozenset(
    {*(key for shape in SHAPES for key in (*shape.keys, *shape.beside)), *_RESPONSES, *_BESIDE, "input", "context"}
    | {"rejected", "label", "question", "choices", "chat_template_kwargs"}
)


def normalise(row: Row, where: str, fields: Mapping[str, str] | None = None, form: str | None = None) -> Normal:
    """Make one row what every record is.

    Args:
        row: as the source holds it.
        where: file and line (or row), for messages.
        fields: our field name (of :data:`FIELDS`) to the row's, where they differ.
        form: the shape to read it as, None to recognise it.

    Raises:
        DataError: naming ``where`` and what is wrong.
    """
    if fields:
        taken = set(fields.values())
        row = {key: value for key, value in row.items() if key not in taken} | {
            ours: row.get(theirs) for ours, theirs in fields.items()
        }
    shape = _shape(row, where) if form is None else next(shape for shape in SHAPES if shape.name == form)
    if not shape.fits(row):
        needed = " and ".join([" or ".join(shape.keys), *shape.beside])
        raise DataError(f"{where}: --format {form} needs the field {needed}; the record has {_names(row)}.")
    try:
        return shape.make(_Reading(row, where))
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply.") from error


def _shape(row: Row, where: str) -> Shape:
    found = {shape.name: shape for shape in SHAPES if shape.fits(row)}
    if not found:
        raise DataError(f"{where}: {_unknown(row)}")
    if found.keys() - {"prompt", "text"}:
        found.pop("text", None)  # most often the conversation once more, rendered for a model; it is named as unread
    if "preference" in found:
        found.pop("prompt", None)
        if "messages" in found and row["messages"] == row["chosen"]:
            found.pop("preference")
    if "messages" in found and "prompt" in found and _repeats(row):
        found.pop("prompt")
    if len(found) > 1:
        names = list(found)
        raise DataError(
            f"{where}: a record must have only one of {' and '.join(names)}; leave all but one out, or say which "
            f"counts with --format {names[0]} or --format {names[1]}."
        )
    return next(iter(found.values()))


def _repeats(row: Row) -> bool:
    """Whether the prompt beside messages is one of them."""
    value = row["messages"]
    return (
        isinstance(value, list)
        and isinstance(row["prompt"], str)
        and any(isinstance(message, Mapping) and message.get("content") == row["prompt"] for message in value)
    )


def _unknown(row: Row) -> str:
    """What to say of a row that has no known shape."""
    pairs = []
    for ours, theirs in (("prompt", _PROMPTS), ("response", _RESPONSES)):
        known = [name for name in theirs if row.get(name) is not None and name != ours]
        pairs += [f"--map {ours}={known[0]}"] if known else []
    hint = " ".join(pairs) if pairs and "prompt" in pairs[0] else "--map prompt=YOUR_FIELD"
    return (
        "a record needs one of the fields text, prompt, messages, conversations, instruction or chosen, but has only "
        f"{_names(row)}; {hint} names another field."
    )


def _names(row: Row) -> str:
    return ", ".join(str(key) for key, value in row.items() if value is not None) or "nothing"
