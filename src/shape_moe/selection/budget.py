"""The budget: one function decides what is kept, whatever the rule, exactly to the expert."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shape_moe.errors import BudgetError, UsageError
from shape_moe.selection.rules import Priority


@dataclass(frozen=True)
class Constraints:
    """What a selection must respect besides its budget.

    Attributes:
        skip_layers: rows that keep every expert (counted in the budget).
        protect: expert ids by row that are kept in any case.
        floor: fewest experts that a layer may keep.
        multiple_of: every pruned layer keeps a multiple of this many.
        groups: router groups of equal size; each keeps the same number.
        equal: every layer keeps the same number.
        allow_rounding: take the nearest feasible budget below an infeasible one.
    """

    skip_layers: frozenset[int] = frozenset()
    protect: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    floor: int = 1
    multiple_of: int = 1
    groups: int = 1
    equal: bool = False
    allow_rounding: bool = False


def choose(
    priority: Priority,
    budget: int,
    constraints: Constraints | None = None,
    *,
    ranks: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
    """Keep ``budget`` experts: those that constraints fix, and the smallest priorities among the rest.

    Fixed are whole skipped layers, protected experts and each layer's floor (its best ranked). The rest enters in
    chunks (of one expert, unless ``multiple_of`` or ``groups`` say otherwise) by their first member's priority.

    Here all ties are broken: between experts of one layer by ``ranks``, then between layers the earlier one first.

    Args:
        priority: float [L, E], smaller is kept first.
        budget: experts to keep over all layers.
        constraints: see :class:`Constraints`.
        ranks: int [L, E], decides between equal priorities of a layer, smaller first; by default the lower id does.

    Returns:
        bool [L, E], True for kept.

    Raises:
        BudgetError: when no selection of that size respects the constraints; it names the nearest that do.
        UsageError: for constraints that contradict each other or the model.
    """
    layers, experts = priority.shape
    room = Room(layers, experts, constraints or Constraints())
    order = room.order(priority, np.zeros(priority.shape, dtype=np.int64) if ranks is None else ranks)
    counts = room.counts(priority, order, room.feasible(budget))
    return room.kept(order, counts)


class Room:
    """What constraints leave open: per layer, how many experts each router group may keep.

    Args:
        layers: number of MoE layers.
        experts: routed experts per layer.
        constraints: see :class:`Constraints`.

    Raises:
        UsageError: for constraints that contradict each other or the model.
    """

    def __init__(self, layers: int, experts: int, constraints: Constraints) -> None:
        self.layers, self.experts, self.rules = layers, experts, constraints
        _check_constraints(layers, experts, constraints)
        self.group_size = experts // constraints.groups
        self.step = math.lcm(constraints.multiple_of, constraints.groups) // constraints.groups
        self.most = self.group_size // self.step * self.step
        base = [self._base(row) for row in range(layers)]
        self.base = [max(base)] * layers if constraints.equal else base
        self.chunk = self.step * constraints.groups * (layers if constraints.equal else 1)
        self.open_rows = [row for row in range(layers) if row not in constraints.skip_layers]

    def _base(self, row: int) -> int:
        """Experts per group that a layer keeps whatever the priorities say."""
        if row in self.rules.skip_layers:
            return self.group_size
        protected = np.bincount(
            np.asarray(self.rules.protect.get(row, ()), dtype=np.int64) // self.group_size,
            minlength=self.rules.groups,
        )
        base = max(-(-self.rules.floor // self.rules.groups), int(protected.max()))
        base = -(-base // self.step) * self.step
        if base > self.most:
            raise UsageError(
                f"Layer row {row}: the floor of {self.rules.floor} and {int(protected.sum())} protected experts need "
                f"{base * self.rules.groups} of {self.experts} experts at a multiple of {self.rules.multiple_of}; "
                "skip the layer, or protect fewer."
            )
        return base

    def order(self, priority: Priority, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Expert ids [L, G, E/G] in the order in which they enter: protected ones, then by priority, then by rank."""
        free = np.ones(priority.shape, dtype=bool)
        for row, protected in self.rules.protect.items():
            free[row, list(protected)] = False
        keys = [key.reshape(self.layers, self.rules.groups, self.group_size) for key in (ranks, priority, free)]
        return np.lexsort(keys) + (np.arange(self.rules.groups) * self.group_size)[None, :, None]

    def feasible(self, budget: int) -> int:
        """The budget itself, or the nearest one below where rounding is allowed.

        Raises:
            BudgetError: when it cannot be met; it names the nearest that can.
        """
        low = sum(self.base) * self.rules.groups
        high = low + sum(self.most - self.base[row] for row in self.open_rows) * self.rules.groups
        if low <= budget <= high and (budget - low) % self.chunk == 0:
            return budget
        inside = low + max(0, budget - low) // self.chunk * self.chunk
        below = min(inside, high) if budget >= low else None
        above = low if below is None else (below + self.chunk if below + self.chunk <= high else None)
        if self.rules.allow_rounding and below is not None:
            return below
        raise BudgetError(self._complaint(budget, low, below, above), below, above)

    def _complaint(self, budget: int, low: int, below: int | None, above: int | None) -> str:
        total = self.layers * self.experts
        near = [f"{n:,} ({n / total:.4f})" for n in (below, above) if n is not None]
        hint = " --allow-rounding takes the one below." if below is not None else ""
        if budget < low:
            why = f"the floor of {self.rules.floor} experts per layer"
            why += ", skipped layers and protected experts" if self.rules.skip_layers or self.rules.protect else ""
            return f"Cannot keep {budget:,} of {total:,} experts: {why} need {low:,} ({low / total:.4f})."
        names = {
            "equal counts in every layer": self.rules.equal,
            f"multiples of {self.rules.multiple_of}": self.rules.multiple_of > 1,
            f"equal counts in {self.rules.groups} router groups": self.rules.groups > 1,
        }
        why = " and ".join(name for name, active in names.items() if active) or "the constraints"
        return (
            f"Cannot keep exactly {budget:,} of {total:,} experts with {why}: "
            f"the nearest that can be kept are {' and '.join(near)}.{hint}"
        )

    def kept(self, order: NDArray[np.int64], counts: Sequence[int]) -> NDArray[np.bool_]:
        """The first experts of every layer and group in their order, as many as counts per group say, bool [L, E]."""
        kept = np.zeros((self.layers, self.experts), dtype=bool)
        for row, count in enumerate(counts):
            kept[row, order[row][:, :count].ravel()] = True
        return kept

    def counts(self, priority: Priority, order: NDArray[np.int64], budget: int) -> list[int]:
        """Experts that each layer keeps per group, once the budget is spent."""
        counts = list(self.base)
        chunks = (budget - sum(counts) * self.rules.groups) // self.chunk
        if self.rules.equal:
            return [count + chunks * self.step for count in counts]
        entries: list[tuple[float, int, int]] = []
        for row in self.open_rows:
            ranked = priority[row][order[row]].min(axis=0)
            entries += [(float(ranked[start]), row, start) for start in range(self.base[row], self.most, self.step)]
        for _, row, _ in sorted(entries)[:chunks]:
            counts[row] += self.step
        return counts


def _check_constraints(layers: int, experts: int, rules: Constraints) -> None:
    if rules.multiple_of < 1 or rules.multiple_of > experts:
        raise UsageError(f"multiple_of must lie between 1 and {experts}, not {rules.multiple_of}.")
    if experts % rules.groups:
        raise UsageError(f"{experts} experts cannot form {rules.groups} router groups of equal size.")
    if rules.equal and rules.skip_layers:
        raise UsageError("Equal counts in every layer and skipped layers exclude each other; leave one of them out.")
    rows = set(rules.skip_layers) | set(rules.protect)
    if rows and not rows <= set(range(layers)):
        raise UsageError(f"Skipped or protected layers must be among the {layers} MoE layers.")
    for row, protected in rules.protect.items():
        if len(set(protected)) != len(protected) or not all(0 <= expert < experts for expert in protected):
            raise UsageError(f"Protected experts of layer row {row} must be different ids between 0 and {experts - 1}.")
