"""YAML read with care: every value has a kind, every key is known, and a mistake is named by its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from shape_moe.errors import UsageError, first_line

T = TypeVar("T")
_REQUIRED: Any = object()


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Refuses a key that is there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Section:
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
    return Section(content, file.name, "")


class Section:
    """A mapping of the file; :meth:`done` refuses the keys that nobody has asked for.

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
            raise UsageError(f"{self.where()} must be a mapping of keys to values, not {_kind(content)}.")
        for key in content:
            if not isinstance(key, str):
                raise UsageError(f"{self.where(str(key))}: a key must be text; put {key!r} in quotes.")
        self.content: dict[str, Any] = content
        self._asked: list[str] = []

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

    def has(self, key: str) -> bool:
        """Whether a key is there with a value."""
        return self._get(key) is not None

    def one(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """A value of one kind (``float`` takes whole numbers as well); ``default`` where it is missing."""
        value = self._get(key)
        if value is None:
            if default is _REQUIRED:
                raise UsageError(f"{self.where(key)} is missing.")
            return default  # type: ignore[no-any-return]  # what the caller says
        return _as(kind, value, self.where(key))

    def some(self, key: str, kind: type[T], default: Any = _REQUIRED) -> tuple[T, ...]:
        """A list of different values of one kind, of which there is at least one."""
        value = self._get(key)
        if value is None:
            if default is _REQUIRED:
                raise UsageError(f"{self.where(key)} is missing; give a list.")
            return default  # type: ignore[no-any-return]  # what the caller says
        if not isinstance(value, list):
            raise UsageError(f"{self.where(key)} must be a list, not {_kind(value)}.")
        if not value:
            raise UsageError(f"{self.where(key)} is empty; name at least one.")
        found = tuple(_as(kind, entry, f"{self.where(key)}, entry {i}") for i, entry in enumerate(value, start=1))
        for entry in found:
            if not isinstance(entry, dict) and found.count(entry) > 1:
                raise UsageError(f"{self.where(key)} names {entry} twice.")
        return found

    def parts(self, key: str) -> list[tuple[str, Section]]:
        """A mapping of names to mappings, of which there is at least one."""
        if not self.has(key):
            raise UsageError(f"{self.where(key)} is missing or empty; name at least one.")
        whole = Section(self._get(key), self.file, f"{self.path}.{key}".lstrip("."))
        if not whole.content:
            raise UsageError(f"{self.where(key)} is empty; name at least one.")
        return [(name, Section(entry, self.file, f"{whole.path}.{name}")) for name, entry in whole.content.items()]

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A mapping of names to plain values, empty where the key is missing."""
        return Section(self._get(key) or {}, self.file, f"{self.path}.{key}".lstrip(".")).content

    def done(self) -> None:
        """Refuse keys that were never asked for.

        Raises:
            UsageError: naming the first of them, and what may have been meant.
        """
        for key in self.content:
            if key not in self._asked:
                near = get_close_matches(key, self._asked, n=1)
                advice = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(set(self._asked)))}."
                raise UsageError(f"{self.where(key)} is not a key; {advice}")

    def _get(self, key: str) -> Any:
        self._asked.append(key)
        return self.content.get(key)


def _as(kind: type[T], value: Any, where: str) -> T:
    if kind is object:
        return value  # type: ignore[no-any-return]  # anything goes
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # type: ignore[return-value]  # float is the kind
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{where} must be {_NAMES[kind]}, not {_kind(value)}.")
    return value


_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return (
        f"{value!r}" if isinstance(value, bool | int | float | str) else _NAMES.get(type(value), type(value).__name__)
    )
