"""Rows as files and datasets hold them, before anything is known about their fields."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from shape_moe.architectures.snapshot import looks_like_path
from shape_moe.errors import DataError, first_line
from shape_moe.literal_paths import plain_name

FIELDS = ("text", "prompt", "response", "messages")
"""Fields that a record is made of, where a row has them."""
_LARGEST_FIELD = 2**31 - 1  # Python's own limit of 128 KiB is less than a long document

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]


def read_rows(source: str, subset: str | None, split: str, revision: str | None = None) -> Rows:
    """Rows as a source holds them, each with the place that messages name.

    Args:
        source: a file of one of the :data:`FILE_TYPES`, a folder written by ``datasets.save_to_disk``, or a dataset's
            name on the hub.
        subset: configuration of a dataset on the hub.
        split: split of a dataset.
        revision: of a dataset on the hub.

    Raises:
        DataError: when the source is missing, or a row cannot be read.
    """
    path = Path(source)
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{path}: unknown file type; use {', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]}.")
        return reader(path)
    return _dataset(source, subset, split, revision)


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """Open a text file; a byte-order mark is skipped, another encoding is an error that says where it begins."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {_undecodable_line(path)}: not UTF-8 text; save the file as UTF-8.") from error


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _jsonl(path: Path) -> Rows:
    with _text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{path}, line {number}", _as_object(line, f"{path}, line {number}")


def _as_object(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a record must be a JSON object, not {type(row).__name__}.")
    return row


def _json(path: Path) -> Rows:
    try:
        with _text(path) as stream:
            rows = json.load(stream)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: a .json file must hold a list of records; one record per line goes into .jsonl.")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, record {i + 1}: a record must be a JSON object, not {type(row).__name__}.")
        yield f"{path}, record {i + 1}", row


def _csv(path: Path) -> Rows:
    before = csv.field_size_limit(_LARGEST_FIELD)
    try:
        with _text(path) as stream:
            reader = csv.DictReader(stream, strict=True)
            try:
                for row in reader:
                    where = f"{path}, line {reader.line_num}"
                    if None in row or None in row.values():
                        raise DataError(f"{where}: the row has another number of columns than the header.")
                    yield where, {key: value for key, value in row.items() if value != ""}
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num + 1}: not valid CSV ({first_line(error)}).") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Rows:
    import polars as pl

    try:
        with path.open("rb") as stream:  # Polars reads patterns and ~ into the names of files
            table = pl.read_parquet(stream)
    except (pl.exceptions.ComputeError, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file.") from error
    for i, row in enumerate(table.iter_rows(named=True)):
        yield f"{path}, row {i + 1}", row


def _dataset(source: str, subset: str | None, split: str, revision: str | None) -> Rows:
    if looks_like_path(source) and not Path(source).is_dir():
        raise DataError(f"There is no file {source}.")
    import datasets

    try:
        if Path(source).is_dir():
            with plain_name(Path(source)) as folder:
                data = datasets.load_from_disk(folder)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source, subset, split=split, revision=revision)
    except KeyError as error:
        raise DataError(f"{source} has no split {split!r}.") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"There is no file {source}, and no dataset of that name could be loaded: {first_line(error)}"
        ) from error
    for i, row in enumerate(data):
        yield f"{source} ({split}), row {i + 1}", row


_READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
FILE_TYPES = tuple(_READERS)
"""Suffixes of the files that are read."""
