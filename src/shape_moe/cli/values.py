"""How the values of options are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from shape_moe.errors import UsageError
from shape_moe.units import share_from

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes from ``24GiB``, ``80 GB`` or a plain number.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        return int(float(match[1]) * _UNITS[match[2] or ""])  # type: ignore[index]  # None is caught below
    except (TypeError, ValueError) as error:
        raise UsageError(f"{text!r} is not a size; write something like 24GiB or 80GB.") from error


def parse_count(text: str) -> int:
    """A number of tokens from ``16k`` (16,384) or ``8192``.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", text.lower())
    if match is None:
        raise UsageError(f"{text!r} is not a number of tokens; write something like 16k or 8192.")
    return int(match[1]) * (1024 if match[2] else 1)


def share_option(name: str, example: str, **settings: Any) -> Any:
    """An option whose value is a share, written ``60%`` or ``0.6``; for use inside ``Annotated[float, ...]``.

    Args:
        name: the option's.
        example: a percentage that makes sense for it.
        settings: what else Typer is to know.
    """
    return typer.Option(name, parser=share_reader(name, example), metavar="SHARE", **settings)


@dataclass(frozen=True)
class Shares:
    """Shares that one option names."""

    values: tuple[float, ...]

    @property
    def only(self) -> float | None:
        """The share where it is one, None where they are several."""
        return self.values[0] if len(self.values) == 1 else None


def shares_option(name: str, example: str, **settings: Any) -> Any:
    """An option whose value is one share or several with commas between them; for ``Annotated[Shares, ...]``.

    Args:
        name: the option's.
        example: a percentage that makes sense for it.
        settings: what else Typer is to know.
    """
    share = share_reader(name, example)

    def read(given: str | Shares) -> Shares:
        return given if isinstance(given, Shares) else Shares(tuple(share(part) for part in str(given).split(",")))

    return typer.Option(name, parser=read, metavar="SHARE", **settings)


def share_reader(name: str, example: str) -> Callable[[str], float]:
    """What reads an option's share; it raises UsageError for what is none."""

    def share(text: str) -> float:
        found = share_from(str(text))  # a default is a number already
        if found is None:
            plain = share_from(example)
            raise UsageError(f"{name} takes a share such as {example} or {plain:g}, not {text!r}.")
        return found

    return share


def parse_pairs(items: list[str] | None, option: str) -> dict[str, str]:
    """``NAME=VALUE`` items as a dictionary.

    Raises:
        UsageError: for an item without ``=``.
    """
    pairs = {}
    for item in items or []:
        name, found, value = item.partition("=")
        if not found or not name:
            raise UsageError(f"{option} takes NAME=VALUE, not {item!r}.")
        pairs[name] = value
    return pairs


def parse_values(items: list[str] | None, option: str) -> dict[str, Any]:
    """``NAME=VALUE`` items; values are read as JSON where they are JSON (``false``, ``3``), else as text."""
    values: dict[str, Any] = {}
    for name, value in parse_pairs(items, option).items():
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


def parse_layers(text: str | None) -> tuple[int, ...]:
    """Layer indices from ``0,1,47``.

    Raises:
        UsageError: for anything else.
    """
    if not text:
        return ()
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UsageError(f"--skip-layers takes layer indices such as 0,1,47, not {text!r}.")
    return tuple(sorted({int(part) for part in text.split(",")}))


def parse_protect(items: list[str] | None) -> dict[int, tuple[int, ...]]:
    """Protected experts by layer from ``3:17,18`` items.

    Raises:
        UsageError: for anything else.
    """
    protect: dict[int, set[int]] = {}
    for item in items or []:
        match = re.fullmatch(r"(\d+):(\d+(?:,\d+)*)", item)
        if match is None:
            raise UsageError(f"--protect takes LAYER:EXPERT,EXPERT, not {item!r}.")
        protect.setdefault(int(match[1]), set()).update(int(part) for part in match[2].split(","))
    return {layer: tuple(sorted(ids)) for layer, ids in protect.items()}
