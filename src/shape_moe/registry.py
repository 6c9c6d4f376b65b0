"""Registries of named parts: those that the package has, and those that other packages add through entry points."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from shape_moe.errors import UsageError, first_line

_LOG = logging.getLogger(__name__)
Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Parts of one kind by name.

    Args:
        kind: what a part is called in messages.
        group: entry-point group through which other packages add parts; loading an entry point registers them.
        modules: modules of this package that register the built-in parts when they are imported.
    """

    def __init__(self, kind: str, group: str, modules: tuple[str, ...]) -> None:
        self.kind, self.group = kind, group
        self._modules = modules
        self._parts: dict[str, Part] = {}
        self._origins: dict[str, str] = {}
        self._loaded = False

    def add(self, name: str, part: Part, function: Callable[..., Any]) -> None:
        """Register a part; the same function may be registered again.

        Args:
            name: what users type.
            part: the part.
            function: what it computes with; says where it comes from.

        Raises:
            UsageError: when another function has that name already.
        """
        origin = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
        known = self._origins.setdefault(name, origin)
        if known != origin:
            raise UsageError(
                f"Two {self.kind}s are called {name!r}: {known} and {origin}; uninstall or rename one of them."
            )
        self._parts[name] = part

    def all(self) -> dict[str, Part]:
        """Every part by name: the built-in ones in the order of their registration, then those of other packages.

        Raises:
            UsageError: when two parts have the same name.
        """
        if not self._loaded:
            for module in self._modules:
                import_module(module)
            for point in sorted(entry_points(group=self.group), key=lambda point: (point.name, point.value)):
                try:
                    point.load()
                except UsageError:
                    raise
                except Exception as error:  # noqa: BLE001 -- other packages' code, which must not break what works
                    _LOG.warning(
                        "%s %s of %s cannot be loaded: %s",
                        self.kind.capitalize(),
                        point.name,
                        point.value,
                        first_line(error),
                    )
            self._loaded = True
        return dict(self._parts)

    def get(self, name: str) -> Part:
        """Look a part up.

        Raises:
            UsageError: for an unknown name.
        """
        known = self.all()
        if name not in known:
            raise UsageError(f"There is no {self.kind} {name!r}; there are {', '.join(sorted(known))}.")
        return known[name]
