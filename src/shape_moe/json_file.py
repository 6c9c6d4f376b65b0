"""JSON that somebody else wrote: read whole, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shape_moe.errors import CheckpointError, first_line


def parse_json(content: str | bytes, where: object) -> Any:
    """Parse JSON.

    Args:
        content: the text.
        where: what it is, for the message.

    Raises:
        CheckpointError: when it is no JSON, or nested or long beyond what a parser takes.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise CheckpointError(f"{where} is not valid: it is nested too deeply.") from error
    except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
        raise CheckpointError(f"{where} is not valid JSON.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: when the file is missing, cannot be read or holds no JSON object.
    """
    try:
        text = file.read_bytes()
    except FileNotFoundError as error:
        if file.is_symlink():
            raise CheckpointError(
                f"{file} is a link to {file.readlink()}, which is not there: the download is incomplete; "
                "download or copy the model again."
            ) from error
        raise CheckpointError(f"{file} is missing.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
    content = parse_json(text, file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object.")
    return content
