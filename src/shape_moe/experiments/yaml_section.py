"""YAML read into dataclasses: every value has the declared type, every key is known, every mistake has its place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from shape_moe.errors import UsageError, first_line

T = TypeVar("T")
_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
_WORDS |= {"array": "a list", "object": "a mapping", "null": "nothing"}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Refuses a key that is there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> YamlSection:
    """Read a YAML file whose content is a mapping.

    Raises:
        UsageError: when there is no such file, or it is not YAML.
    """
    if not file.is_file():
        raise UsageError(f"There is no file {file}.")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # a safe loader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{file}{line}: not valid YAML ({error.problem}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not valid YAML ({first_line(error)}).") from error
    return YamlSection(content, file.name, "")


class YamlSection:
    """A mapping of the file, whose keys :meth:`take` turns into dataclasses; :meth:`done` refuses what is left.

    Args:
        content: the mapping.
        file: the file's name, for messages.
        path: the keys that lead here, with dots between.

    Raises:
        UsageError: when it is no mapping from names.
    """

    def __init__(self, content: Any, file: str, path: str) -> None:
        self.file, self.path = file, path
        if not isinstance(content, dict):
            raise UsageError(f"{self.where()} must be a mapping of keys to values, not {_shown(content)}.")
        for key in content:
            if not isinstance(key, str):
                raise UsageError(f"{self.where(str(key))}: a key must be text; put {key!r} in quotes.")
        self.content: dict[str, Any] = {key: value for key, value in content.items() if value is not None}
        self._known: set[str] = set()

    def where(self, key: str = "") -> str:
        """How a key is named in messages."""
        path = ".".join(part for part in (self.path, key) if part)
        return f"{self.file}: {path}" if path else self.file

    @contextmanager
    def naming(self, key: str = "") -> Iterator[None]:
        """Name the place in errors that others raise about a value."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{self.where(key)}: {error}") from error

    def take(self, kind: type[T], names: Mapping[str, str] | None = None, **given: Any) -> T:
        """Make a dataclass out of the keys that are its fields.

        Args:
            kind: the dataclass.
            names: how the file calls fields that have another name there.
            given: values of fields that the file does not name.

        Raises:
            UsageError: naming the key that is missing, has a value of another type, or one that ``kind`` refuses.
        """
        keys = {entry.name: (names or {}).get(entry.name, entry.name) for entry in fields(kind)}  # type: ignore[arg-type]
        values = {name: self.content[key] for name, key in keys.items() if name not in given and key in self.content}
        for name, entries in values.items():
            if isinstance(entries, list) and name != "weights":  # of which several may be equal
                self._check_list(keys[name], entries)
        self._known |= {key for name, key in keys.items() if name not in given}
        try:
            with self.naming():
                return msgspec.convert({**values, **given}, kind)
        except msgspec.ValidationError as error:
            raise UsageError(self._complaint(str(error), values, keys)) from error

    def _check_list(self, key: str, entries: list[Any]) -> None:
        if not entries:
            raise UsageError(f"{self.where(key)} is empty; name at least one.")
        if again := [entry for entry in entries if not isinstance(entry, dict) and entries.count(entry) > 1]:
            raise UsageError(f"{self.where(key)} names {again[0]} twice.")

    def _complaint(self, message: str, values: dict[str, Any], keys: dict[str, str]) -> str:
        """What msgspec finds wrong, in the words of this package."""
        if missing := re.fullmatch(r"Object missing required field `(\w+)`", message):
            return f"{self.where(keys[missing[1]])} is missing."
        found = re.fullmatch(r"Expected `([\w| ]+)`(?: >= (\d+))?(?:, got `\w+`)? - at `\$\.(\w+)(.*)`", message)
        if found is None:
            return f"{self.where()}: {message}."
        types, least, name, rest = found.groups()
        value, place = values[name], keys[name]
        if index := re.fullmatch(r"\[(\d+)\]", rest):
            value, place = value[int(index[1])], f"{place}, entry {int(index[1]) + 1}"
        wanted = " or ".join(_WORDS.get(word, word) for word in types.split(" | ") if word != "null")
        wanted = f"at least {least}" if least else wanted
        if rest and not index:
            return f"{self.where(place)}: every value must be {wanted}."
        return f"{self.where(place)} must be {wanted}, not {_shown(value)}."

    def parts(self, key: str) -> list[tuple[str, YamlSection]]:
        """A mapping of names to mappings, of which there is at least one."""
        self._known.add(key)
        whole = YamlSection(self.content.get(key) or {}, self.file, f"{self.path}.{key}".lstrip("."))
        if not whole.content:
            raise UsageError(
                f"{self.where(key)} is {'empty' if key in self.content else 'missing'}; name at least one."
            )
        return [(name, YamlSection(entry, self.file, f"{whole.path}.{name}")) for name, entry in whole.content.items()]

    def nested(self, key: str) -> YamlSection:
        """The mapping under a key."""
        self._known.add(key)
        return YamlSection(self.content[key], self.file, f"{self.path}.{key}".lstrip("."))

    def done(self) -> None:
        """Refuse keys that no dataclass has.

        Raises:
            UsageError: naming the first of them, and what may have been meant.
        """
        for key in self.content:
            if key not in self._known:
                near = get_close_matches(key, self._known, n=1)
                advice = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(self._known))}."
                raise UsageError(f"{self.where(key)} is not a key; {advice}")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return _WORDS["object" if isinstance(value, dict) else "array"]
    return "nothing" if value is None else repr(value)
