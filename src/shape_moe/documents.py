"""Documents of ours read back: JSON of a declared shape, or one sentence that says what is wrong with it."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shape_moe.errors import CheckpointError, first_line

Shape = TypeVar("Shape")
MOST_EXPERTS = 2**15 - 1
"""The largest number of experts that any document may name: expert ids are stored as int16."""


def as_shape(document: Any, shape: type[Shape], file: Path, what: str) -> Shape:
    """Make a document what it was declared to be; numbers are never rounded, and texts never read as numbers.

    Args:
        document: what was read.
        shape: a dataclass.
        file: where it was read, for the message.
        what: what the file should be, for the message ("a selection").

    Raises:
        CheckpointError: naming an entry of the wrong type, one that is not known, or a number that is not finite.
    """
    if is_dataclass(shape) and isinstance(document, dict):
        unknown = sorted(set(document) - {field.name for field in fields(shape)})
        if unknown:
            raise CheckpointError(f"{file} is not {what}: it has the unknown entry {unknown[0]!r}.")
    try:
        found = msgspec.convert(document, shape, str_keys=True)
    except (msgspec.ValidationError, OverflowError) as error:
        reason = first_line(error).replace("`", "").rstrip(".")
        raise CheckpointError(f"{file} is not {what}: {reason}.") from error
    if (place := _infinite(document)) is not None:
        raise CheckpointError(f"{file} is not {what}: {place} is not a finite number.")
    return found


def _infinite(content: Any, place: str = "$") -> str | None:
    """The place of the first number that is not finite, None where there is none."""
    if isinstance(content, float):
        return None if math.isfinite(content) else place
    entries: Any = ()
    if isinstance(content, dict):
        entries = ((f"{place}.{key}", value) for key, value in content.items())
    elif isinstance(content, list):
        entries = ((f"{place}[{i}]", value) for i, value in enumerate(content))
    return next((found for name, value in entries if (found := _infinite(value, name)) is not None), None)
