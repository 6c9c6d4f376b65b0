"""Results of verbs as files: read whole, or refused with what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shape_moe.errors import DataError, UsageError
from shape_moe.json_file import read_json

FORMAT_VERSION = 1
Result = TypeVar("Result")


def header(verb: str) -> dict[str, Any]:
    """What a result begins with."""
    return {"format_version": FORMAT_VERSION, "verb": verb}


def read_result(path: Path, name: str, verb: str, build: Callable[[Mapping[str, Any]], Result]) -> Result:
    """Read what a verb wrote.

    Args:
        path: the file, or the folder that it lies in.
        name: the file's usual name.
        verb: the verb that wrote it.
        build: makes the result out of the document; what it misses there is an error that names the file.

    Raises:
        CheckpointError: when there is no such file, or it is not JSON.
        DataError: when it is no result of the verb in this format version, or damaged; the message says how.
    """
    file = path / name if path.is_dir() else path
    document = read_json(file)
    if document.get("format_version") != FORMAT_VERSION or document.get("verb") != verb:
        raise DataError(f"{file} is not a result of shape-moe {verb}, or was written in another format version.")
    try:
        return build(document)
    except KeyError as error:
        raise DataError(f"{file} is damaged: {error.args[0]!r} is missing.") from error
    except (TypeError, ValueError, AttributeError, IndexError, UsageError) as error:
        raise DataError(f"{file} is damaged: {str(error).rstrip('.')}.") from error
