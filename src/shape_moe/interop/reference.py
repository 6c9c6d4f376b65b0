"""What the reference implementation's JSON files have in common: layers as keys, and metadata beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shape_moe.errors import DataError

METADATA = "_metadata"


def read_layers(file: Path) -> tuple[dict[int, Any], dict[str, Any]]:
    """Read a file of entries by decoder layer.

    Returns:
        The entries by layer, ascending, and the metadata (empty where there is none).

    Raises:
        DataError: when the file is missing, is no JSON object, or has a key that is neither a layer nor metadata.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"There is no file {file}.") from error
    except (ValueError, IsADirectoryError) as error:
        raise DataError(f"{file} is not a JSON file.") from error
    if not isinstance(document, dict):
        raise DataError(f"{file} does not hold a JSON object.")
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise DataError(f"{file}: {METADATA} must be an object.")
    unknown = [key for key in document if not is_layer(key)]
    if unknown or not document:
        what = f"the key {unknown[0]!r} is not a layer" if unknown else "it names no layer"
        raise DataError(f'{file}: layers are keys like "0" and "47", but {what}.')
    return {int(key): document[key] for key in sorted(document, key=int)}, metadata


def is_layer(key: str) -> bool:
    """Whether a key names a layer, in its one spelling."""
    return key.isascii() and key.isdigit() and str(int(key)) == key
