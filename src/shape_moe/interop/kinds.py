"""What a file is, told by its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from shape_moe.errors import DataError, UsageError
from shape_moe.interop.imatrix import is_imatrix
from shape_moe.interop.reference import METADATA, is_layer

Kind = Literal["responses", "coalitions", "selected", "imatrix", "selection", "trace"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Responses of a server (JSONL); coalition counts and selected experts of the reference implementation (JSON); an
imatrix of llama.cpp; our own selection (JSON, or in a pruned checkpoint) and trace (a folder)."""


def kind_of(source: Path) -> Kind:
    """Tell what a file or folder is.

    Raises:
        UsageError: when it does not exist.
        DataError: when it is none of :data:`KINDS`.
    """
    if not source.exists():
        raise UsageError(f"There is no file {source}.")
    kind = _folder_kind(source) if source.is_dir() else _file_kind(source)
    if kind is None:
        raise DataError(
            f"{source} is neither server responses (JSONL), coalition counts, selected experts, an imatrix, a "
            f"selection nor a trace; --from names what it should be, one of {', '.join(KINDS)}."
        )
    return kind


def _folder_kind(folder: Path) -> Kind | None:
    if (folder / "trace.json").is_file():
        return "trace"
    return "selection" if (folder / "shape" / "selection.json").is_file() else None


def _file_kind(file: Path) -> Kind | None:
    if file.suffix.lower() == ".csv":
        raise UsageError(f"{file} needs no conversion: select and score read a table of values as it is.")
    if file.suffix.lower() == ".jsonl":
        return "responses"
    if is_imatrix(file):
        return "imatrix"
    with file.open("rb") as stream:
        first = _object(next((line for line in stream if line.strip()), b""))
    if first is not None:
        return _document_kind(first)
    whole = _object(file.read_bytes())
    return None if whole is None else _document_kind(whole)


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _document_kind(document: dict[str, Any]) -> Kind | None:
    if "format_version" in document and "layers" in document:
        return "selection"
    if "choices" in document or "meta_info" in document:
        return "responses"
    entries = [value for key, value in document.items() if key != METADATA and is_layer(key)]
    if entries and all(isinstance(entry, list) for entry in entries):
        return "selected"
    return "coalitions" if entries and all(isinstance(entry, dict) for entry in entries) else None
