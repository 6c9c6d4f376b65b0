"""Rules: scores become a priority, a total order over all (layer, expert) pairs; smaller is kept first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.registry import Registry

Values = NDArray[np.floating]
Priority = NDArray[np.float64]
RuleFunction = Callable[[Values, Values | None], Priority]
_MAX_BISECTIONS = 200


@dataclass(frozen=True)
class Rule:
    """A named rule; calling it gives the priority.

    Attributes:
        name: what users type.
        function: from values [L, E] and a tiebreak [L, E] (usually tokens routed to the expert; None for none) to a
            priority [L, E], smaller is kept first.
        by_rank: whether the priority depends on ranks within layers alone.
        within_layers: whether a layer's priorities depend on its own values alone, and not on their scale. This
            decides how the scores of several classes are made comparable: as shares of their layer, or of the model.
        by_curves: whether layer curves decide how many experts each layer keeps, so that scores only rank them; the
            priority is that of equal counts and is not used to spend a budget.
    """

    name: str
    function: RuleFunction
    by_rank: bool = False
    within_layers: bool = False
    by_curves: bool = False

    @property
    def by_layer(self) -> bool:
        """Whether classes are made comparable layer by layer."""
        return self.by_rank or self.within_layers

    def __call__(self, values: Values, tiebreak: Values | None = None) -> Priority:
        """The priority, float64 [L, E].

        Raises:
            ShapeMoeError: when the function gives something else than finite numbers [L, E].
        """
        priority = np.asarray(self.function(values, tiebreak), dtype=np.float64)
        if priority.shape != np.shape(values) or not np.isfinite(priority).all():
            raise ShapeMoeError(
                f"Rule {self.name!r} must return finite numbers of shape {np.shape(values)}, not {priority.shape}."
            )
        return priority


_RULES: Registry[Rule] = Registry("rule", "shape_moe.rules", ())


def register(
    name: str, *, by_rank: bool = False, within_layers: bool = False, by_curves: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function as a rule; see :class:`Rule` for the arguments.

    Raises:
        UsageError: when another function has that name already.
    """

    def add(function: RuleFunction) -> RuleFunction:
        _RULES.add(name, Rule(name, function, by_rank, within_layers, by_curves), function)
        return function

    return add


def layer_ranks(values: Values, tiebreak: Values | None = None) -> NDArray[np.int64]:
    """Rank of every expert within its layer, best first: larger value, then larger tiebreak, then lower id.

    Args:
        values: float [L, E].
        tiebreak: float [L, E], usually tokens routed to the expert.

    Returns:
        int64 [L, E], 0 for the best.
    """
    values = _checked(values)
    tiebreak = np.zeros_like(values) if tiebreak is None else np.asarray(tiebreak, dtype=np.float64)
    ids = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    ranks = np.empty(values.shape, dtype=np.int64)
    np.put_along_axis(ranks, np.lexsort((ids, -tiebreak, -values)), ids, axis=1)
    return ranks


@register("coverage", within_layers=True)
def coverage_priority(values: Values, tiebreak: Values | None = None) -> Priority:
    r"""Priority of SHAPE's quality-coverage selection (arXiv 2606.09886).

    Rank a layer's experts by value, best first. For an expert of positive value::

        tau = value mass ranked before it / value mass of its layer

    where negative values count as zero mass. Keeping the shortest prefix whose mass reaches ``alpha`` of the layer's
    keeps exactly the experts with ``alpha > tau``, so ``tau`` is the priority, and the K smallest meet a budget of K
    with one ``alpha`` for all layers. Experts without positive value follow at ``1 + rank/E`` (``rank/E`` in a layer
    without any mass).

    Args:
        values: float [L, E]; rows are layers.
        tiebreak: float [L, E], decides between equal values (larger first), then the lower id.

    Returns:
        float64 [L, E], smaller is kept first.

    Raises:
        UsageError: for values that are not finite or not a table.
    """
    values = _checked(values)
    ranks = layer_ranks(values, tiebreak)
    experts = values.shape[1]
    mass = np.take_along_axis(np.maximum(values, 0), np.argsort(ranks, axis=1), axis=1)
    total = np.cumsum(mass, axis=1)
    before = np.concatenate([np.zeros((len(values), 1)), total[:, :-1]], axis=1)
    layer_mass = total[:, -1:]
    tau = np.divide(before, layer_mass, out=np.zeros_like(before), where=layer_mass > 0)
    by_expert = np.take_along_axis(tau, ranks, axis=1)
    last = np.where(layer_mass > 0, 1.0, 0.0) + ranks / experts
    return np.where(values > 0, by_expert, last)


@register("uniform", by_rank=True)
def uniform_priority(values: Values, tiebreak: Values | None = None) -> Priority:
    """Priority that keeps the same number of experts in every layer (to within one): ``rank / E``."""
    ranks = layer_ranks(values, tiebreak)
    return np.asarray(ranks / values.shape[1])


@register("global")
def global_priority(values: Values, tiebreak: Values | None = None) -> Priority:
    """Priority that compares values across layers as they are: the larger value first."""
    del tiebreak  # ties are broken by rank, wherever a budget is spent
    return -_checked(values)


@register("measured", by_rank=True, by_curves=True)
def measured_priority(values: Values, tiebreak: Values | None = None) -> Priority:
    """Ranks within layers, ``rank / E``; how many of them each layer keeps is what layer curves say.

    See :mod:`shape_moe.selection.layer_curves`.
    """
    return uniform_priority(values, tiebreak)


def get_rule(name: str) -> Rule:
    """Look a rule up.

    Raises:
        UsageError: for an unknown name.
    """
    return _RULES.get(name)


def check_by_priority(name: str) -> None:
    """Refuse a rule that needs more than scores, where several methods are compared.

    Raises:
        UsageError: for an unknown rule, and for one that goes by layer curves.
    """
    if get_rule(name).by_curves:
        raise UsageError(
            f"Rule {name} goes by layer curves, which belong to one scorer and one routing: it is for `shape-moe "
            "select`, and for `prune` with a scorer and a keep rate."
        )


def rules() -> dict[str, Rule]:
    """All rules by name that spend a budget by a priority alone, installed packages' included."""
    return {name: rule for name, rule in _RULES.all().items() if not rule.by_curves}


def budget_for(keep: float, total: int) -> int:
    """Experts to keep at a keep rate: ``floor(keep * total + 1/2)``, computed exactly.

    Raises:
        UsageError: for a rate outside (0, 1].
    """
    if not (isinstance(keep, int | float) and 0 < keep <= 1):
        number = isinstance(keep, int | float)
        shown, meant = (f"{keep:g}", keep if 1 < keep <= 100 else 60) if number else (repr(keep), 60)
        raise UsageError(
            f"The keep rate must be above 0 and at most 1, not {shown}: write {meant / 100:g} or {meant:g}% to keep "
            f"{meant:g} % of the experts."
        )
    return math.floor(Fraction(str(keep)) * total + Fraction(1, 2))


def bisection_budget(priority: Priority, keep: float, tolerance: float) -> int:
    """The number of experts that the paper's bisection over ``alpha`` ends with.

    Start with ``lo = 0``, ``hi = 1``; test the midpoint; stop when the keep rate is within ``tolerance`` of ``keep``;
    else ``lo = mid`` when too few experts are kept, ``hi = mid`` when too many.

    Args:
        priority: float [L, E] from :func:`coverage_priority`.
        keep: the keep rate asked for.
        tolerance: largest accepted difference in keep rate.

    Raises:
        UsageError: when no ``alpha`` comes within the tolerance.
    """
    budget_for(keep, priority.size)
    low, high = 0.0, 1.0
    for _ in range(_MAX_BISECTIONS):
        alpha = (low + high) / 2
        kept = int((alpha > priority).sum())
        rate = kept / priority.size
        if abs(rate - keep) <= tolerance:
            return kept
        if rate < keep:
            low = alpha
        else:
            high = alpha
    raise UsageError(
        f"No alpha gives a keep rate within {tolerance} of {keep}; leave --tolerance out to meet the budget exactly."
    )


def _checked(values: Values) -> NDArray[np.float64]:
    checked = np.asarray(values, dtype=np.float64)
    if checked.ndim != 2 or checked.size == 0 or not np.isfinite(checked).all():
        raise UsageError("Values must be a table [layers, experts] of finite numbers.")
    return checked
