"""The registry of scorers: built-in ones, and those that other packages add through entry points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shape_moe.registry import Registry
from shape_moe.tracing.token_weights import SegmentWeights, TokenWeights
from shape_moe.tracing.trace import Trace

_BUILT_IN = (
    "shape",
    "contribution",
    "replacement",
    "frequency",
    "gating",
    "reap",
    "ean",
    "easy_ep",
    "random",
    "imatrix_energy",
)


@dataclass(frozen=True)
class ScoreOptions:
    """How a trace is scored.

    Attributes:
        weights: how much tokens count; None leaves it to the scorer.
        seed: of random scores.
        pool_classes: add classes of examples up before they are scored, instead of joining their scores.
        by_layer: how the scores of classes become shares before they are joined, as the rule needs it: of their layer,
            or of the whole model; see :func:`shape_moe.scoring.classes.joined`.
    """

    weights: TokenWeights | None = None
    seed: int = 0
    pool_classes: bool = False
    by_layer: bool = True


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
        weights: how much tokens count where nothing else is asked for.
        converted: whether it values traces alone that are converted from a file of another tool; see :func:`scorers`.
    """

    name: str
    needs: tuple[str, ...]
    function: ScoreFunction
    least_top_k: int = 1
    weights: TokenWeights = field(default_factory=SegmentWeights)
    converted: bool = False

    def weights_for(self, trace: Trace, asked: TokenWeights | None) -> TokenWeights:
        """How much the tokens of a trace count.

        Args:
            trace: the trace. Where it cannot tell what tokens predict, all count alike unless something is asked for.
            asked: the weights that are asked for, None for the scorer's own.

        Raises:
            UsageError: for weights by what tokens predict, where the trace cannot tell.
        """
        if asked is not None:
            trace.check_weights(asked)
            return asked
        return SegmentWeights() if trace.lacks else self.weights

    def can_value(self, top_k: int) -> bool:
        """Whether its values say anything about a model with so many experts per token."""
        return top_k >= self.least_top_k

    @property
    def summary(self) -> str:
        """First line of the function's documentation, without markup."""
        return (self.function.__doc__ or "").strip().split("\n")[0].replace("``", "")


_SCORERS: Registry[Scorer] = Registry(
    "scorer", "shape_moe.scorers", tuple(f"shape_moe.scoring.{module}" for module in _BUILT_IN)
)


def register(
    name: str,
    *,
    needs: tuple[str, ...],
    least_top_k: int = 1,
    weights: TokenWeights | None = None,
    converted: bool = False,
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a score function under a name.

    Args:
        name: what users type.
        needs: names of statistics that the trace must hold, or ``coalitions``.
        least_top_k: fewest experts per token with which the values say anything.
        weights: how much tokens count where nothing else is asked for; None counts all alike.
        converted: whether it values traces alone that are converted from a file of another tool.

    Raises:
        UsageError: when another function has that name already.
    """

    def add(function: ScoreFunction) -> ScoreFunction:
        _SCORERS.add(name, Scorer(name, needs, function, least_top_k, weights or SegmentWeights(), converted), function)
        return function

    return add


def scorers(*, converted: bool = False) -> dict[str, Scorer]:
    """All scorers by name.

    Args:
        converted: whether to give those as well that value converted traces alone, and none that is made of a model.
    """
    return {name: found for name, found in sorted(_SCORERS.all().items()) if converted or not found.converted}


def get_scorer(name: str) -> Scorer:
    """Look a scorer up.

    Raises:
        UsageError: for an unknown name.
    """
    return _SCORERS.get(name)
