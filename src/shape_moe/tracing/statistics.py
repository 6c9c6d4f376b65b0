"""Statistics: what a trace may hold, in a registry with entry points.

A statistic is a function of what one call of a layer's experts module shows (:class:`Observed`): the residual stream
``h``, the expert ids, the gate weights ``g`` as received, the experts' outputs ``E_i`` before weighting, and the routed
output ``y``. It gives one term for every token, for every (token, slot) or for every pair of slots; the recorder adds
terms up (or takes their maximum), by class, by cell and by fold or half of the examples, without the function's help.
Other packages add statistics through the entry-point group ``shape_moe.statistics``; see docs/add-a-scorer.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shape_moe.calibration.batches import CELLS, FOLDS
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.registry import Registry

if TYPE_CHECKING:
    import torch

    from shape_moe.tracing.observed import Observed

Axes = Literal["expert", "layer", "pair"]
Reduction = Literal["sum", "max"]
Per = Literal["slot", "expert", "token", "pair"]
HALVES = 2
"""The Gram matrices are kept for this many halves of the examples: even and odd folds."""
MOST_CLASSES = 64
"""So many classes of examples can be kept apart in one trace."""
MOST_PAIR_BYTES = 2**30
"""A statistic of pairs that would take more memory than this, over all layers and classes, is left out of a trace."""
AXES: dict[Axes, tuple[str, ...]] = {
    "layer": ("layer", "class", "cell", "fold"),
    "expert": ("layer", "class", "cell", "fold", "expert"),
    "pair": ("layer", "class", "cell", "half", "expert", "expert"),
}
"""The axes of every statistic of a trace, by what one of its numbers is about: this is where they are named.

A *class* is a group of examples that must not be paid for with another. A *cell* is one of
:data:`shape_moe.calibration.batches.CELLS`: the segment of a token, and whether the *next* token is response. Examples
are dealt into *folds* by their position; the even and the odd ones are the two *halves*.
"""
_AXES: dict[Per, Axes] = {"slot": "expert", "expert": "expert", "token": "layer", "pair": "pair"}


@dataclass(frozen=True)
class Layout:
    """How a statistic lies in a trace, whoever knows its formula.

    Attributes:
        axes: a key of :data:`AXES`.
        reduction: how tokens, and later traces, are put together.
    """

    axes: Axes
    reduction: Reduction

    def __post_init__(self) -> None:
        if self.axes not in AXES or self.reduction not in ("sum", "max"):
            raise CheckpointError(f"No statistic has axes {self.axes!r} and reduction {self.reduction!r}.")

    def shape(self, layers: int, classes: int, experts: int) -> tuple[int, ...]:
        """Shape of the array of a trace with so many layers, classes and experts per layer."""
        lengths = {"layer": layers, "class": classes, "cell": len(CELLS), "fold": FOLDS, "half": HALVES}
        return tuple(experts if axis == "expert" else lengths[axis] for axis in AXES[self.axes])

    def too_large(self, layers: int, classes: int, experts: int) -> str | None:
        """Why a statistic of this layout is left out of such a trace; None where it is not."""
        size = 8 * math.prod(self.shape(layers, classes, experts))
        if self.axes != "pair" or size <= MOST_PAIR_BYTES:
            return None
        return (
            f"{layers} layers of {experts} experts in {classes} classes need {size / 2**30:.1f} GiB, "
            f"more than {MOST_PAIR_BYTES / 2**30:.0f} GiB"
        )


@dataclass(frozen=True)
class Statistic:
    """A named statistic.

    Attributes:
        name: key in the file.
        per: what one term belongs to: ``slot`` is [T, k], an expert that served the token; ``expert`` is [T, E], every
            expert of the layer; ``token`` is [T]; ``pair`` is [T, k, k], two experts that served the token.
        reduction: how terms, and later traces, are put together.
        meaning: what is summed (or maximised) over tokens, in the words of docs/method.md.
        function: the terms of the tokens that one call shows, of the shape that ``per`` says.
        whole: whether it counts, and is kept as whole numbers.
        next_choice: whether it looks at :attr:`Observed.next`, which costs one more expert per token.
        gate_scale: whether it is recorded only where routers do not renormalise, so that it matters whether the weights
            of the experts that stay grow by what was removed.
    """

    name: str
    per: Per
    reduction: Reduction
    meaning: str
    function: Callable[[Observed], torch.Tensor]
    whole: bool = False
    next_choice: bool = False
    gate_scale: bool = False

    @property
    def layout(self) -> Layout:
        """How it lies in a trace."""
        return Layout(_AXES[self.per], self.reduction)


_STATISTICS: Registry[Statistic] = Registry(
    "statistic", "shape_moe.statistics", ("shape_moe.tracing.built_in_statistics",)
)


def statistic(
    name: str,
    *,
    per: Per,
    meaning: str,
    reduction: Reduction = "sum",
    whole: bool = False,
    next_choice: bool = False,
    gate_scale: bool = False,
) -> Callable[[Callable[[Observed], torch.Tensor]], Callable[[Observed], torch.Tensor]]:
    """Register a function as a statistic; see :class:`Statistic` for the arguments.

    Raises:
        UsageError: when another function has that name already, or a statistic is declared that cannot be recorded.
    """
    if per not in _AXES or reduction not in ("sum", "max"):
        raise UsageError(f"Statistic {name!r}: a term is per {', '.join(_AXES)}, and its reduction is sum or max.")
    if reduction == "max" and per != "slot":
        raise UsageError(f"Statistic {name!r}: a maximum is taken per slot.")

    def add(function: Callable[[Observed], torch.Tensor]) -> Callable[[Observed], torch.Tensor]:
        entry = Statistic(name, per, reduction, meaning, function, whole, next_choice, gate_scale)
        _STATISTICS.add(name, entry, function)
        return function

    return add


def statistics() -> dict[str, Statistic]:
    """All statistics by name: those that a Transformers trace holds, installed packages' included."""
    return _STATISTICS.all()


def get_statistic(name: str) -> Statistic:
    """Look a statistic up.

    Raises:
        UsageError: for an unknown name.
    """
    return _STATISTICS.get(name)


def fitting(
    recorded: Iterable[Statistic], layers: int, classes: int, experts: int
) -> tuple[tuple[Statistic, ...], dict[str, str]]:
    """The statistics that a trace of this size can hold, and why others are left out, by name."""
    kept, left_out = [], {}
    for entry in recorded:
        reason = entry.layout.too_large(layers, classes, experts)
        if reason is None:
            kept.append(entry)
        else:
            left_out[entry.name] = reason
    return tuple(kept), left_out
