"""Tables of rows: files, folders, data sets of the hub, and Python lists, read row by row when a row is wanted."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from shape_moe.architectures.snapshot import looks_like_path
from shape_moe.calibration.files import FILE_TYPES, Row, Rows, Table, drop_holes, file_table, file_type
from shape_moe.errors import DataError, first_line
from shape_moe.literal_paths import plain_name

__all__ = ["FILE_TYPES", "Row", "Rows", "Table"]
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
_NOT_PLAIN = re.compile(r"[^\w./+@,=-]")
"""What ``datasets`` could read as a pattern, an address or a chain of them."""
IN_MEMORY = "records in memory"
"""What stands for a source that has no name."""


class Indexed(Protocol):
    """What Python lists and data sets share."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Data = str | PathLike[str] | Indexed
"""Where records come from: a file, folder or name, a list of dictionaries, or a ``datasets.Dataset``."""


class InMemory(str):
    """The name that stands for rows which a Python program hands over; carries the rows."""

    __slots__ = ("rows",)
    rows: Indexed

    @classmethod
    def of(cls, rows: Indexed, name: str = IN_MEMORY) -> InMemory:
        """Rows under a name."""
        found = cls(name)
        found.rows = rows
        return found

    def __deepcopy__(self, _memo: object) -> InMemory:
        return self


class ListTable:
    """Rows that a Python program hands over.

    Args:
        name: what to call them.
        values: the rows; anything with a length and an index.
        holes: whether None means that a field is not there, as in Arrow tables.
    """

    def __init__(self, name: str, values: Indexed, *, holes: bool = False) -> None:
        self.name, self._values, self._holes = name, values, holes
        self.said = ""

    def __len__(self) -> int:
        return len(self._values)

    def rows(self, wanted: Collection[int] | None = None) -> Rows:
        """The wanted rows (None for all) in order; a :class:`DataError` stands for a bad one."""
        for index in range(len(self)) if wanted is None else sorted(wanted):
            where, row = f"{self.name}, row {index + 1}", self._values[index]
            if not isinstance(row, Mapping):
                yield index, where, DataError(f"{where}: a record must be a mapping, not {type(row).__name__}.")
            else:
                yield index, where, drop_holes(row) if self._holes else row


def open_tables(source: str, subset: str | None, split: str, revision: str | None = None) -> list[Table]:
    """The tables of a source.

    Args:
        source: a file, a folder (one of ``datasets.save_to_disk``, or one that holds data files, such as a cloned data
            set), or a data set's name on the hub, where ``NAME@REVISION`` names a revision. Paths are literal.
        subset: configuration of a data set.
        split: split of a data set.
        revision: of a data set on the hub.

    Raises:
        DataError: when the source is missing or cannot be opened.
    """
    path = Path(source)
    if path.is_file():
        return [file_table(path)]
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            return [_saved(path, split)]
        return _folder(path, subset, split)
    if looks_like_path(source) or path.suffix.lower() in FILE_TYPES:
        raise DataError(f"There is no file {source}.")
    name, _, named = source.partition("@")
    return [_hub(name, subset, split, named or revision)]


def memory_table(data: InMemory, split: str) -> Table:
    """A table of rows that a Python program hands over.

    Raises:
        DataError: for what holds no rows, and for data sets without this split.
    """
    rows, kind = data.rows, type(data.rows)
    if isinstance(rows, Mapping):  # a DatasetDict
        if split not in rows:
            raise DataError(f"The data set has no split {split!r}; it has {', '.join(map(str, rows)) or 'none'}.")
        rows = rows[split]
    if not hasattr(rows, "__len__"):
        raise DataError(
            "Records must have a number and an order; of a streamed data set take some first, as "
            f"datasets.Dataset.from_list(list(data.take(1000))), not {kind.__name__}."
        )
    return ListTable(str(data), rows, holes=kind.__module__.partition(".")[0] == "datasets")


def read_rows(
    source: str, subset: str | None, split: str, revision: str | None = None
) -> Iterator[tuple[str, Row | DataError]]:
    """All rows of a source, each with the place that messages name."""
    for table in open_tables(source, subset, split, revision):
        for _, where, row in table.rows():
            yield where, row


def _saved(path: Path, split: str) -> Table:
    import datasets

    try:
        with plain_name(path) as folder:
            data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a data set that can be read: {first_line(error)}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"{path} has no split {split!r}; it has {', '.join(data)}.")
        data = data[split]
    return ListTable(f"{path} ({split})", data, holes=True)


def _folder(path: Path, subset: str | None, split: str) -> list[Table]:
    """The data files of a split in a folder, as ``datasets`` finds them by name and by the folder's README."""
    import datasets

    try:
        with _plain_names(path) as (plain, places):
            files = datasets.load_dataset_builder(str(plain), subset).config.data_files or {}
            found = {
                str(name): [places.get(Path(file), path / Path(file).relative_to(plain)) for file in entries]
                for name, entries in files.items()
            }
    except (OSError, ValueError, TypeError, LookupError, datasets.exceptions.DatasetsError) as error:
        types = ", ".join(FILE_TYPES)
        raise DataError(
            f"{path} is a folder without data files that can be read ({types}, also with .gz or .zst): "
            f"{first_line(error)}"
        ) from error
    if split not in found:
        raise DataError(f"{path} has no split {split!r}; it has {', '.join(found)}.")
    read = [file for file in found[split] if file_type(file) is not None]
    if not read:
        raise DataError(f"{path}: the split {split!r} holds no file of a type that is read ({', '.join(FILE_TYPES)}).")
    return [file_table(file) for file in sorted(read)]


@contextmanager
def _plain_names(path: Path) -> Iterator[tuple[Path, dict[Path, Path]]]:
    """A folder in which no name has any of the letters that ``datasets`` could take for more, and what its files are.

    It is the folder itself, or one of empty files: there, each such letter is a hyphen.
    """
    path = path.resolve()
    held = [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = [file for file in held if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not any(_NOT_PLAIN.search(str(file)) for file in (path, *files)):
        yield path, {}
        return
    with tempfile.TemporaryDirectory() as name:
        copy, places = Path(name).resolve(), dict[Path, Path]()
        for number, file in enumerate(files):
            inside = str(file.relative_to(path))
            plain = copy / _NOT_PLAIN.sub("-", inside)
            if plain in places or (_NOT_PLAIN.search(inside) and path / plain.relative_to(copy) in files):
                plain = plain.with_name(f"{number}-{plain.name}")
            plain.parent.mkdir(parents=True, exist_ok=True)
            plain.write_bytes(file.read_bytes() if file.name == "README.md" else b"")
            places[plain] = file
        yield copy, places


def _hub(name: str, subset: str | None, split: str, revision: str | None) -> Table:
    import datasets

    try:
        data = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"There is no file {name}, and no dataset of that name could be loaded: {first_line(error)}"
        ) from error
    return ListTable(f"{name} ({split})", data, holes=True)
