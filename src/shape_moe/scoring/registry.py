"""The registry of scorers: built-in ones, and those that other packages add through entry points."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shape_moe.errors import UsageError, first_line
from shape_moe.tracing.trace import SegmentWeights, Trace

_LOG = logging.getLogger(__name__)
ENTRY_POINT_GROUP = "shape_moe.scorers"
_BUILT_IN = ("shape", "contribution", "frequency", "gating", "reap", "ean", "easy_ep", "random")


@dataclass(frozen=True)
class ScoreOptions:
    """What a user may choose when a trace is scored: factors on segments, and the seed of random scores."""

    weights: SegmentWeights = field(default_factory=SegmentWeights)
    seed: int = 0


class ScoreFunction(Protocol):
    """A pure function of a trace: float64 [L, E], larger is more valuable."""

    def __call__(self, trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
        """Score every (layer, expert)."""


@dataclass(frozen=True)
class Scorer:
    """A named score function.

    Attributes:
        name: what users type.
        needs: names of statistics that the trace must hold, ``coalitions`` among them.
        function: the score function.
        least_top_k: fewest experts per token with which its values say anything.
    """

    name: str
    needs: tuple[str, ...]
    function: ScoreFunction
    least_top_k: int = 1

    def can_value(self, top_k: int) -> bool:
        """Whether its values say anything about a model with so many experts per token."""
        return top_k >= self.least_top_k

    @property
    def summary(self) -> str:
        """First line of the function's documentation, without markup."""
        return (self.function.__doc__ or "").strip().split("\n")[0].replace("``", "")


_SCORERS: dict[str, Scorer] = {}


def register(name: str, *, needs: tuple[str, ...], least_top_k: int = 1) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a score function under a name.

    Args:
        name: what users type.
        needs: names of statistics that the trace must hold, or ``coalitions``.
        least_top_k: fewest experts per token with which the values say anything.

    Raises:
        UsageError: when another function has that name already.
    """

    def add(function: ScoreFunction) -> ScoreFunction:
        known = _SCORERS.get(name)
        if known is not None and _origin(known.function) != _origin(function):
            raise UsageError(
                f"Two scorers are called {name!r}: {_origin(known.function)} and {_origin(function)}; "
                "uninstall or rename one of them."
            )
        _SCORERS[name] = Scorer(name, needs, function, least_top_k)
        return function

    return add


def _origin(function: ScoreFunction) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"


@cache
def _load_all() -> None:
    for module in _BUILT_IN:
        import_module(f"shape_moe.scoring.{module}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 -- other packages' code, which must not break the scorers that work
            _LOG.warning("Scorer %s of %s cannot be loaded: %s", point.name, point.value, first_line(error))


def scorers() -> dict[str, Scorer]:
    """All scorers by name."""
    _load_all()
    return dict(sorted(_SCORERS.items()))


def get_scorer(name: str) -> Scorer:
    """Look a scorer up.

    Raises:
        UsageError: for an unknown name.
    """
    known = scorers()
    if name not in known:
        raise UsageError(f"There is no scorer {name!r}; there are {', '.join(known)}.")
    return known[name]
