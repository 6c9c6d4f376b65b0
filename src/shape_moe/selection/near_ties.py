"""Near-ties: experts on either side of the cut that rounding alone could exchange.

Two traces of the same examples with other threads, batch sizes or devices agree but for rounding. Their selections are
equal but for the experts that are named here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shape_moe.scoring.scores import Scores
from shape_moe.selection.budget import Constraints, Room
from shape_moe.selection.rules import Priority, Rule, layer_ranks

ROUNDING = {"float32": 2e-5, "float64": 2e-5}
"""How far rounding moves a value, as a share of itself. Measured in float32: at most 7e-6 for ``contribution``, whose
terms have both signs, and 7e-7 for the others (embedded model; 1 and 2 threads, batches of 1, 3, 8; docs/method.md)."""
HALF_PRECISION = 1e-4
"""The same for a model that was traced in bfloat16 or float16, where a device's own order of sums shows sooner. A CPU
gives all batch sizes the same bits; other devices were not measured."""

_Mask = NDArray[np.bool_]
_SLACK = 3.0


def rounding_of(dtype: str) -> float:
    """The bound for values of a trace that was made in a dtype."""
    return ROUNDING.get(dtype, HALF_PRECISION)


def priority_bounds(rule: Rule, scores: Scores, rounding: float) -> tuple[Priority, Priority]:
    """The smallest and the largest priority that each expert has when rounding moves the values.

    An expert's priority is smallest with its own value raised and all others lowered. For rules whose priority is a
    share of the layer's mass that is not quite the extreme: both ends are widened by ``3 rounding |priority|``, which
    covers it (ranks are exact). A value of exactly 0 (an expert that was never routed to) stays 0.

    Args:
        rule: from values to priorities; better values must not give a worse priority.
        scores: values [L, E].
        rounding: see :data:`ROUNDING`.

    Returns:
        float64 [L, E] twice.
    """
    values, tiebreak = scores.values, scores.tiebreak
    priority = rule(values, tiebreak)
    if not rounding:
        return priority, priority
    size = rounding * np.abs(values)
    raised, lowered = values + size, values - size
    first, last = np.empty_like(priority), np.empty_like(priority)
    for expert in range(scores.num_experts):
        for bound, own, others in ((first, raised, lowered), (last, lowered, raised)):
            moved = others.copy()
            moved[:, expert] = own[:, expert]
            bound[:, expert] = rule(moved, tiebreak)[:, expert]
    slack = 0.0 if rule.by_rank else _SLACK * rounding * np.abs(priority)
    return np.minimum(first, priority) - slack, np.maximum(last, priority) + slack


def near_ties(
    rule: Rule,
    scores: Scores,
    kept: _Mask,
    constraints: Constraints,
    bounds: tuple[Priority, Priority],
) -> _Mask:
    """Which experts rounding could move across the cut.

    Within a layer (and router group) these are the kept and dropped experts whose ranges of priority meet; between
    layers those of the last chunks to enter and the first not to, where the chunks' ranges meet. What the number of
    the layer decides between equal priorities is no near-tie. Where layer curves decide how many experts a layer keeps,
    that number is taken as it is.

    Args:
        rule: the rule that was used.
        scores: the values.
        kept: bool [L, E], the selection.
        constraints: that it respects.
        bounds: from :func:`priority_bounds`.

    Returns:
        bool [L, E], True for experts that another trace may keep or drop instead.
    """
    cut = _Cut(rule, scores, kept, constraints, bounds)
    found = np.zeros(kept.shape, dtype=bool)
    for row in cut.rows:
        cut.mark(found, row, cut.counts[row])
    if not constraints.equal and not rule.by_curves:
        for row, start in cut.close_chunks():
            found[row, cut.order[row][:, start : start + cut.room.step].ravel()] = True
            for edge in (start, start + cut.room.step):
                cut.mark(found, row, edge)
    for row, protected in constraints.protect.items():
        found[row, list(protected)] = False
    return found


class _Cut:
    """A selection's cut through the order in which experts enter."""

    def __init__(
        self, rule: Rule, scores: Scores, kept: _Mask, constraints: Constraints, bounds: tuple[Priority, Priority]
    ) -> None:
        layers, experts = kept.shape
        self.room = Room(layers, experts, constraints)
        ranks = layer_ranks(scores.values, scores.tiebreak)
        self.priority = rule(scores.values, scores.tiebreak)
        self.order = self.room.order(self.priority, ranks)
        self.first, self.last = bounds
        self.ranked = rule.by_rank and constraints.groups == 1
        self.free = np.ones(kept.shape, dtype=bool)
        for row, protected in constraints.protect.items():
            self.free[row, list(protected)] = False
        self.rows = [row for row in range(self.room.layers) if row not in constraints.skip_layers]
        self.counts = [int(count) // constraints.groups for count in kept.sum(axis=1)]

    def mark(self, found: _Mask, row: int, count: int) -> None:
        """Mark experts of each group whose ranges meet across a place in their order."""
        for members in self.order[row]:
            inside = [expert for expert in members[:count] if self.free[row, expert]]
            outside = members[count:]
            if inside and len(outside):
                best, worst = self.first[row, outside].min(), self.last[row, inside].max()
                found[row, [expert for expert in inside if self.last[row, expert] >= best]] = True
                found[row, [expert for expert in outside if self.first[row, expert] <= worst]] = True

    def close_chunks(self) -> list[tuple[int, int]]:
        """Chunks, by row and place, that could enter instead of one that did, or the other way round."""
        entries = [entry for row in self.rows for entry in self._entries(row)]
        inside = [(last, row, start) for row, start, _, last in entries if start < self.counts[row]]
        outside = [(first, row, start) for row, start, first, _ in entries if start >= self.counts[row]]
        if not inside or not outside:
            return []
        worst, best = max(inside), min(outside)  # ties as choose() breaks them: the earlier layer enters first
        close = [entry for entry in inside if entry > best] + [entry for entry in outside if entry < worst]
        return [(row, start) for _, row, start in close]

    def _entries(self, row: int) -> Iterator[tuple[int, int, float, float]]:
        """Row, place, and the range of the priority with which a layer's open chunks enter."""
        room = self.room
        exact = self.ranked and bool(self.free[row].all())  # whoever is at a place, its rank is that of the place
        bounds = (self.priority, self.priority) if exact else (self.first, self.last)
        first, last = (self._sorted(bound, row).min(axis=0) for bound in bounds)
        for start in range(room.base[row], room.most, room.step):
            yield row, start, float(first[start]), float(last[start])

    def _sorted(self, bound: Priority, row: int) -> NDArray[np.float64]:
        """A bound of the experts at each place of the order, [G, E/G]: protected ones, then the others ascending."""
        values = np.where(self.free[row], bound[row], -np.inf)[self.order[row]]
        return np.sort(values, axis=1)
