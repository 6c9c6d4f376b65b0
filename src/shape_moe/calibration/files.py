"""Data files as tables of rows: JSONL, JSON, CSV, TSV, Parquet and text, also packed with gzip or zstd."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec

from shape_moe.calibration.schema import parse_json
from shape_moe.errors import DataError, first_line

_LARGEST_FIELD = 2**31 - 1  # Python's own limit of 128 KiB is less than a long document
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_BOM = b"\xef\xbb\xbf"

Row = Mapping[str, Any]
Rows = Iterator[tuple[int, str, "Row | DataError"]]
"""Rows with their index and the place that messages name; an error stands for a row that cannot be read."""


class Table(Protocol):
    """Rows that are read when they are wanted.

    Attributes:
        name: what to call the table.
        said: what there is to say of how it is read.
    """

    name: str
    said: str

    def __len__(self) -> int: ...

    def rows(self, wanted: Collection[int] | None = None) -> Rows:
        """The wanted rows (None for all) in order; a :class:`DataError` stands for a bad one."""


def file_type(path: Path) -> str | None:
    """The suffix in :data:`FILE_TYPES` that a file has (under that of its packing), None for another one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def file_table(path: Path) -> Table:
    """The rows of a file.

    Raises:
        DataError: for an unknown file type, and for a file that is damaged as a whole.
    """
    kind = file_type(path)
    if kind is None:
        raise DataError(
            f"{path}: unknown file type; use {', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]}, also packed as .gz or "
            ".zst."
        )
    return _READERS[kind](path)


def drop_holes(value: Any) -> Any:
    """A value without the None entries of dictionaries: Arrow fills what a row lacks with them."""
    if isinstance(value, Mapping):
        return {key: drop_holes(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [drop_holes(entry) for entry in value]
    return value


_WRAPPERS = ("data", "rows", "records", "examples", "samples", "train")
"""Keys under which an object holds its records, beside what tells of all of them."""
_OF_RECORDS = {"messages", "conversations", "prompt", "instruction", "text", "chosen"}


class _Lines:
    """Records of a file line by line; a line that is not wanted is not parsed."""

    def __init__(self, path: Path, parse: Callable[[bytes, str], Row], said: str = "") -> None:
        self.name, self.said, self._path, self._parse = str(path), said, path, parse
        self._length = sum(1 for _ in _lines(path))

    def __len__(self) -> int:
        return self._length

    def rows(self, wanted: Collection[int] | None = None) -> Rows:
        """See :class:`Table`."""
        chosen = None if wanted is None else set(wanted)
        last = self._length if chosen is None else max(chosen, default=-1) + 1
        for index, (number, line) in enumerate(_lines(self._path)):
            if index >= last:
                return
            if chosen is None or index in chosen:
                where = f"{self._path}, line {number}"
                yield index, where, _attempt(self._parse, line, where)


class _Parsed:
    """Records that lie in memory, parsed when they are wanted."""

    def __init__(self, path: Path, entries: list[tuple[str, Any]], parse: Callable[[Any, str], Row]) -> None:
        self.name, self.said, self._entries, self._parse = str(path), "", entries, parse

    def __len__(self) -> int:
        return len(self._entries)

    def rows(self, wanted: Collection[int] | None = None) -> Rows:
        """See :class:`Table`."""
        for index in range(len(self)) if wanted is None else sorted(wanted):
            where, entry = self._entries[index]
            yield index, where, entry if isinstance(entry, DataError) else _attempt(self._parse, entry, where)


class _Frame:
    """Rows of a Parquet file."""

    def __init__(self, path: Path) -> None:
        import polars as pl

        self.name, self.said = str(path), ""
        try:
            with path.open("rb") as stream:  # Polars reads patterns and ~ into the names of files
                self._table = pl.read_parquet(stream)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file.") from error

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, wanted: Collection[int] | None = None) -> Rows:
        """See :class:`Table`."""
        for index in range(len(self)) if wanted is None else sorted(wanted):
            yield index, f"{self.name}, row {index + 1}", drop_holes(self._table.row(index, named=True))


def _attempt(parse: Callable[[Any, str], Row], entry: Any, where: str) -> Row | DataError:
    try:
        return parse(entry, where)
    except DataError as error:
        return error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked."""
    import pyarrow as pa

    packing = _PACKED.get(path.suffix.lower())
    try:
        if packing is None:
            with path.open("rb") as stream:
                yield stream
        else:
            with pa.input_stream(str(path), compression=packing) as packed:
                yield io.BufferedReader(packed)
    except OSError as error:
        if packing is None:
            raise DataError(f"{path} cannot be read: {first_line(error)}.") from error
        raise DataError(f"{path} is no {packing} file, or damaged: {first_line(error)}.") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; a byte-order mark is skipped."""
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            content = _unmarked(line, path) if number == 1 else line
            if content.strip():
                yield number, content


def _unmarked(data: bytes, path: Path) -> bytes:
    """The beginning of a file without a byte-order mark of UTF-8; those of other encodings are told."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise DataError(f"{path}: UTF-16 or UTF-32 text; save the file as UTF-8.")
    return data.removeprefix(_BOM)


def _as_object(line: bytes, where: str) -> Row:
    return _object(parse_json(line, where), where)


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a record must be a JSON object, not {type(row).__name__}.")
    return row


def _as_text(line: bytes, where: str) -> Row:
    try:
        return {"text": line.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text; save the file as UTF-8.") from error


def _json(path: Path) -> Table:
    """A list of records, one record, a dictionary that holds a list, or, as many .json files do, one record a line."""
    first = [line for _, line in islice(_lines(path), 2)]
    if len(first) == 2 and all(line.lstrip()[:1] == b"{" for line in first):
        return _Lines(path, _as_object, "one JSON record a line")
    with _opened(path) as stream:
        data = _unmarked(stream.read(), path)
    try:
        data.decode()
        entries = msgspec.json.decode(data, type=list[msgspec.Raw] | dict[str, msgspec.Raw])
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8.") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply.") from error
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: a .json file must hold a list of records, or one record a line.") from error
    except msgspec.DecodeError as error:
        reason, line = first_line(error).removeprefix("JSON is malformed: "), _line_of(data, str(error))
        raise DataError(f"{path}, line {line}: not valid JSON ({reason}).") from error
    if isinstance(entries, dict):
        lists = {key: value for key, value in entries.items() if bytes(value).lstrip()[:2] in (b"[{", b"[\n", b"[ ")}
        wrappers = () if _OF_RECORDS & entries.keys() else _WRAPPERS
        key = next((name for name in lists if len(entries) == 1 or name in wrappers), None)
        if key is None:
            return _Parsed(path, [(f"{path}, record 1", data)], _as_object)
        value = lists[key]
        entries = msgspec.json.decode(value, type=list[msgspec.Raw])
        table = _Parsed(path, _numbered(path, entries), _as_object)
        table.said = f"the list under {key!r}"
        return table
    return _Parsed(path, _numbered(path, entries), _as_object)


def _numbered(path: Path, entries: list[msgspec.Raw]) -> list[tuple[str, Any]]:
    return [(f"{path}, record {i}", bytes(entry)) for i, entry in enumerate(entries, start=1)]


def _line_of(data: bytes, message: str) -> int:
    """The line of the byte that an error names, the last line where it names none."""
    _, found, place = message.partition("(byte ")
    end = int(place.partition(")")[0]) if found else len(data)
    return data.count(b"\n", 0, end) + 1


def _csv(path: Path, delimiter: str = ",") -> Table:
    with _opened(path) as stream:
        data = _unmarked(stream.read(), path)
    header, said = data.partition(b"\n")[0], ""
    if delimiter == "," and b"," not in header and b";" in header:
        delimiter, said = ";", "columns parted by semicolons"
    text = data.decode(errors="surrogateescape")  # a row that is not UTF-8 is told when it is wanted
    before = csv.field_size_limit(_LARGEST_FIELD)
    entries: list[tuple[str, Any]] = []
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                where = f"{path}, line {reader.line_num + 1}"
                entries.append((where, DataError(f"{where}: not valid CSV ({first_line(error)}).")))
            else:
                entries.append((f"{path}, line {reader.line_num}", row))
    finally:
        csv.field_size_limit(before)
    table = _Parsed(path, entries, _csv_row)
    table.said = said
    return table


def _csv_row(row: dict[Any, Any], where: str) -> Row:
    try:
        "".join(value for value in row.values() if isinstance(value, str)).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: not UTF-8 text; save the file as UTF-8.") from error
    if None in row or None in row.values():
        raise DataError(f"{where}: the row has another number of columns than the header.")
    return {key: value for key, value in row.items() if value != ""}


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": lambda path: _Lines(path, _as_object),
    ".ndjson": lambda path: _Lines(path, _as_object),
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".parquet": _Frame,
    ".txt": lambda path: _Lines(path, _as_text, "one text a line"),
}
FILE_TYPES = tuple(_READERS)
"""Suffixes of the files that are read."""
