"""Named calibration sets (``--data preset:gsm8k``): where a set is, which part to read, how its prompts are made.

The sets themselves are data, in ``presets.toml``. ``preset:NAME`` reads a set from the hub, ``preset:NAME@PATH`` a
local copy with the same fields: a folder written by ``datasets.save_to_disk``, or a JSONL, JSON, CSV or Parquet file.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import jinja2

from shape_moe.calibration.shapes import FIELDS
from shape_moe.calibration.sources import FILE_TYPES, Row, Rows, read_rows
from shape_moe.errors import DataError, UsageError

PREFIX = "preset:"
CALIBRATION, EVALUATION = "calibration", "evaluation"
"""The parts of a set that is dealt out by this module because it has no split of its own for calibration."""


@dataclass(frozen=True)
class Preset:
    """A named calibration set.

    Attributes:
        name: what follows ``preset:``.
        title: the benchmark's name.
        dataset: name on the hub.
        split: the split that is read.
        evaluation: what to judge by instead.
        why: why what is read is not what models are judged by.
        prompt: template of the prompt.
        response: template of the response.
        licence: of the data.
        checked: what the fields, splits and configurations were compared with.
        verified: whether all of them were found there.
        subset: configuration.
        revision: of the dataset on the hub.
        gated: whether the hub wants an account that accepted its terms.
        key: field that tells rows apart, where parts are dealt out.
        one_in: one row in this many is for calibration, by a hash of its key.
        without: configuration whose rows are left out, by their key; they are the evaluation part.
        labels: names of tags, for the templates.
    """

    name: str
    title: str
    dataset: str
    split: str
    evaluation: str
    why: str
    prompt: str
    response: str
    licence: str
    checked: str
    verified: bool
    subset: str | None = None
    revision: str | None = None
    gated: bool = False
    key: str | None = None
    one_in: int | None = None
    without: str | None = None
    labels: tuple[str, ...] = ()

    @property
    def dealt(self) -> bool:
        """Whether calibration and evaluation are parts of one split."""
        return self.key is not None

    @property
    def default_split(self) -> str:
        """What ``--split`` is when nobody says."""
        return CALIBRATION if self.dealt else self.split


@cache
def presets() -> dict[str, Preset]:
    """Every preset by its name."""
    tables = tomllib.loads(files("shape_moe.calibration").joinpath("presets.toml").read_text(encoding="utf-8"))
    return {
        name: Preset(name=name, **{**table, "labels": tuple(table.get("labels", ()))})
        for name, table in sorted(tables.items())
    }


def find_preset(source: str) -> Preset | None:
    """The preset that a source names, None where it names none.

    Raises:
        UsageError: for an unknown preset; the message lists all.
    """
    if not source.startswith(PREFIX):
        return None
    name, copy, path = source.removeprefix(PREFIX).partition("@")
    if name not in presets():
        raise UsageError(f"There is no preset {name!r}; the presets are {', '.join(presets())}.")
    if copy and not path:
        raise UsageError(f"{source} names no local copy: a path follows the @.")
    return presets()[name]


def local_copy(source: str) -> str:
    """The path in ``preset:NAME@PATH``, empty where a source names no local copy."""
    return source.partition("@")[2] if source.startswith(PREFIX) else ""


def with_base(source: str, base: Path) -> str:
    """A preset's source with the absolute path of its local copy; ``base`` is where a relative one begins."""
    path = local_copy(source)
    return source.removesuffix(path) + str((base / Path(path).expanduser()).resolve()) if path else source


def check_split(preset: Preset, split: str, subset: str | None) -> None:
    """Refuse what a preset decides itself.

    Raises:
        UsageError: for a configuration, and for a part that a dealt-out set does not have.
    """
    if subset is not None:
        raise UsageError(f"Preset {preset.name} decides the configuration itself; leave --subset out.")
    if preset.dealt and split not in {CALIBRATION, EVALUATION}:
        raise UsageError(
            f"Preset {preset.name} deals one set out into --split {CALIBRATION} and --split {EVALUATION}; "
            f"it has no {split!r}."
        )


class PresetTable:
    """The rows of a preset as records: fields ``prompt`` and ``response``, and the row's own fields beside them.

    Args:
        preset: the preset.
        local: path of a local copy, empty for the set on the hub.
        split: the split, or :data:`CALIBRATION` or :data:`EVALUATION` of a set that is dealt out.

    Raises:
        DataError: when the set cannot be read, or a row lacks a field that the preset needs to deal rows out.
    """

    def __init__(self, preset: Preset, local: str, split: str) -> None:
        self.name, self.said = f"{PREFIX}{preset.name}", preset.title
        self._preset, self._rows = preset, list(_raw_rows(preset, local, split))

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, wanted: Collection[int] | None = None) -> Rows:
        """The wanted rows (None for all) in order; a :class:`DataError` stands for one that is not of this preset."""
        for index in range(len(self)) if wanted is None else sorted(wanted):
            where, row = self._rows[index]
            try:
                yield index, where, compose(self._preset, row, where)
            except DataError as error:
                yield index, where, error


def compose(preset: Preset, row: Row, where: str) -> dict[str, Any]:
    """A row with its prompt and response.

    Raises:
        DataError: when the row lacks a field, or a field is not what the preset expects.
    """
    try:
        texts = {
            name: _template(getattr(preset, name)).render(row, row=row, labels=preset.labels).strip()
            for name in ("prompt", "response")
        }
    except (jinja2.UndefinedError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        fields = ", ".join(row) or "none"
        raise DataError(
            f"{where}: the record is not one of preset {preset.name}: {error}; its fields are {fields}."
        ) from error
    return {key: value for key, value in row.items() if key not in FIELDS} | texts


def _raw_rows(preset: Preset, local: str, split: str) -> Iterator[tuple[str, Row]]:
    if preset.without is not None:
        return _left_over(preset, local, split)
    if preset.one_in is None:
        return _rows_of(preset, local, preset.subset, split)
    rows = _rows_of(preset, local, preset.subset, preset.split)
    return (
        (where, row)
        for where, row in rows
        if (_hash(preset.name, _key(preset, row, where)) % preset.one_in == 0) == (split == CALIBRATION)
    )


def _left_over(preset: Preset, local: str, split: str) -> Iterator[tuple[str, Row]]:
    """What a configuration holds beside the rows of another one; or that other one, for evaluation."""
    held_back = list(_rows_of(preset, local, preset.without, preset.split))
    if split == EVALUATION:
        yield from held_back
        return
    keys = {_key(preset, row, where) for where, row in held_back}
    for where, row in _rows_of(preset, local, preset.subset, preset.split):
        if _key(preset, row, where) not in keys:
            yield where, row


def _rows_of(preset: Preset, local: str, subset: str | None, split: str) -> Iterator[tuple[str, Row]]:
    if local:
        yield from _good(read_rows(_file_of(preset, local, subset), None, split))
        return
    try:
        yield from _good(read_rows(preset.dataset, subset, split, preset.revision))
    except DataError as error:
        terms = ". Its terms must be accepted on the hub first" if preset.gated else ""
        raise DataError(
            f"{str(error).rstrip('.')}{terms}. A local copy of {preset.dataset} is read with "
            f"--data {PREFIX}{preset.name}@PATH."
        ) from error


def _good(rows: Iterable[tuple[str, Row | DataError]]) -> Iterator[tuple[str, Row]]:
    for where, row in rows:
        if isinstance(row, DataError):
            raise row
        yield where, row


def _file_of(preset: Preset, local: str, subset: str | None) -> str:
    """Where a local copy lies: where the user says, or for two configurations in that folder under their names."""
    folder = Path(local).expanduser()
    if not folder.exists():
        raise DataError(f"There is no file {local}.")
    if preset.without is None:
        return str(folder)
    for suffix in ("", *FILE_TYPES):
        path = folder / f"{subset}{suffix}"
        if path.exists():
            return str(path)
    raise DataError(
        f"Preset {preset.name} leaves the records of {preset.without} out of {preset.subset}, so its local copy is a "
        f"folder with both of them, each a file or a folder of that name; there is no {subset} in {local}."
    )


def _key(preset: Preset, row: Row, where: str) -> str:
    assert preset.key is not None
    if row.get(preset.key) is None:
        raise DataError(f"{where}: preset {preset.name} tells records apart by {preset.key!r}, which this one lacks.")
    return str(row[preset.key]).strip()


def _hash(*texts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:8], "big")


def _text(value: Any) -> str:
    """A field as text; one without a value is refused (and one that is not there at all refuses itself)."""
    if value is None:
        raise ValueError("a field has no value")
    return str(value)


def _lettered(options: Iterable[str]) -> str:
    return "\n".join(f"{_letter(place)}. {_text(option)}" for place, option in enumerate(options))


def _letter(answer: int | str, choices: int = len(ascii_uppercase)) -> str:
    """A, B, ... from a place (from 0) or a letter of either case, among so many choices."""
    letters = ascii_uppercase[:choices]
    if isinstance(answer, int) and answer in range(choices):
        return letters[answer]
    text = _text(answer).strip().upper()
    if len(text) != 1 or text not in letters:
        raise ValueError(f"{text!r} is neither a letter nor the place of one of {choices} choices")
    return text


def _without(text: str, pattern: str) -> str:
    return re.sub(pattern, "", _text(text))


def _shuffled(options: Iterable[str]) -> list[str]:
    """An order that tells nothing about which came first, and is the same everywhere."""
    return sorted(options, key=lambda option: (_hash(option), option))


def _entities(tokens: Sequence[str], tags: Sequence[int], labels: Sequence[str]) -> str:
    """``entity: TYPE`` lines from tokens with BIO tags, ``none`` without entities."""
    spans: list[tuple[list[str], str]] = []
    open_type = None
    for token, tag in zip(tokens, tags, strict=True):
        if tag not in range(len(labels)):
            raise ValueError(f"there is no tag {tag!r}")
        prefix, _, kind = labels[tag].partition("-")
        if prefix == "I" and kind == open_type:
            spans[-1][0].append(token)
        elif kind:
            spans.append(([token], kind))
        open_type = kind or None
    return "\n".join(f"{' '.join(words)}: {kind}" for words, kind in spans) or "none"


@cache
def _template(text: str) -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_text,
        autoescape=False,  # text, not HTML  # noqa: S701
    )
    environment.filters |= {
        "entities": _entities,
        "letter": _letter,
        "lettered": _lettered,
        "shuffled": _shuffled,
        "without": _without,
    }
    return environment.from_string(text)
