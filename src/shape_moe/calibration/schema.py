"""The one schema that every record becomes, whatever shape its file had, and JSON that cannot hurt on the way there."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec

from shape_moe.errors import DataError, first_line

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]
"""A :class:`Turn` as a dictionary, which is what chat templates and servers read."""
_DEEPEST = 64
_LARGEST = 2**1023


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """The function that is called; arguments are text only where they are no JSON object."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    arguments: dict[str, Any] | str = {}


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """One call."""

    function: Function
    type: Literal["function"] = "function"
    id: str | msgspec.UnsetType = msgspec.UNSET


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    """One message. Only an assistant's may have no content: it then thinks or calls."""

    role: Role
    content: str | None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: Annotated[list[ToolCall], msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    tool_call_id: str | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET


class Content(msgspec.Struct, forbid_unknown_fields=True):
    """What a record says: exactly one of ``text``, ``prompt`` and ``messages``; ``response`` goes with ``prompt``.

    ``tools`` are the functions that the assistant may call, as JSON schemas.
    """

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: Annotated[list[Turn], msgspec.Meta(min_length=1)] | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)] | None = None


def checked(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a :class:`Content`, messages as dictionaries.

    Raises:
        DataError: naming ``where``, for what does not fit the schema, is nested too deeply, or is no JSON value.
    """
    _check_plain(content, where, 0)
    try:
        found = msgspec.convert(content, type=Content)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DataError(f"{where}: the record is not what it looks like: {first_line(error)}.") from error
    fields: dict[str, Any] = msgspec.to_builtins(found)
    return fields


def parse_json(data: bytes | str, where: str) -> Any:
    """A JSON value.

    Raises:
        DataError: naming ``where``, for what is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return msgspec.json.decode(data)
    except UnicodeError as error:
        raise DataError(f"{where}: not UTF-8 text; save the file as UTF-8.") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply.") from error
    except msgspec.DecodeError as error:
        reason = first_line(error).removeprefix("JSON is malformed: ")
        if _has_lone_surrogate(data):
            reason = "half of a surrogate pair (\\ud800 to \\udfff) stands alone in it"
        raise DataError(f"{where}: not valid JSON ({reason}).") from error


def _has_lone_surrogate(data: bytes | str) -> bool:
    import json

    try:
        value = json.dumps(json.loads(data), ensure_ascii=False)
        value.encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        return False
    return False


def _check_plain(value: Any, where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise DataError(f"{where}: nested more than {_DEEPEST} levels deep.")
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(key, where, depth + 1)
            _check_plain(entry, where, depth + 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_plain(entry, where, depth + 1)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: half of a surrogate pair ({value[error.start]!r}) stands alone in its text, which no "
                "tokenizer takes."
            ) from error
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: {value} is no number of JSON.")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise DataError(f"{where}: a number has more than 308 digits.")
