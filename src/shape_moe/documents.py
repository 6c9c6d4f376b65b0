"""Documents of ours read back: JSON of a declared shape, or one sentence that says what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from shape_moe.errors import CheckpointError

Shape = TypeVar("Shape")
MOST_EXPERTS = 2**15 - 1
"""The largest number of experts that any document may name: expert ids are stored as int16."""


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: when the file is missing or holds anything else.
    """
    try:
        content = json.loads(file.read_bytes(), parse_constant=_refuse)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing.") from error
    except RecursionError as error:
        raise CheckpointError(f"{file} is not valid JSON: it is nested too deeply.") from error
    except ValueError as error:  # also text that is not UTF-8, and integers of thousands of digits
        raise CheckpointError(f"{file} is not valid JSON: {_line(error)}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object.")
    return content


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def as_shape(document: Any, shape: type[Shape], file: Path, what: str) -> Shape:
    """Make a document what it was declared to be; numbers are never rounded, and texts never read as numbers.

    Args:
        document: what was read.
        shape: a dataclass.
        file: where it was read, for the message.
        what: what the file should be, for the message ("a selection").

    Raises:
        CheckpointError: naming the entry of the wrong type, or one that is not known.
    """
    if is_dataclass(shape) and isinstance(document, dict):
        unknown = sorted(set(document) - {field.name for field in fields(shape)})
        if unknown:
            raise CheckpointError(f"{file} is not {what}: it has the unknown entry {unknown[0]!r}.")
    try:
        return msgspec.convert(document, shape, str_keys=True)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{file} is not {what}: {_line(error)}.") from error


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].replace("`", "").rstrip(".")
