"""Layer curves: what each layer's cut costs by itself, measured; a small versioned JSON file.

``K[l][n]`` is the mean KL divergence from the dense model when only layer ``l`` is cut to its ``n`` best experts, at
the tokens that predict a response. It was measured at some ``n``; ``K[l][E] = 0``, a running maximum from ``E``
downwards takes noise out, and between measured counts the curve is linear. Rule ``measured`` shares a budget out by
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.moe_config import GateScale
from shape_moe.documents import as_shape
from shape_moe.errors import CheckpointError, FingerprintError, UsageError
from shape_moe.json_file import read_json
from shape_moe.selection.budget import Room
from shape_moe.selection.method import Method, Routing
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import TraceInfo
from shape_moe.workspace import write_text

FORMAT_VERSION = 1
_GRID = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 28)
"""Counts at which a layer is measured, in parts of ``E`` divided by 32."""


@dataclass(frozen=True)
class LayerCurves:
    """What each layer's cut costs.

    Attributes:
        fingerprint: of the model.
        model: its name.
        scorer: whose ranking the layers were cut by.
        options: how that scorer weighed tokens, and its seed.
        routing: ``drop`` or ``reroute``, in which the layers were cut.
        num_experts: routed experts per layer (``E``).
        layers: decoder-layer indices of the rows.
        counts: experts kept at each measured point, ascending and below ``E``.
        classes: names of the classes of examples.
        tokens: predicting tokens by class and half of the examples.
        sums: KL divergence in nats summed over those tokens, by layer, count, class and half.
        gate_scale: ``survivors`` or ``trained``, with which the layers were cut.
        seen: salted hashes of the prompts that it was made from, those of the trace included, by their salt; None where
            they are not known.
    """

    fingerprint: str
    model: str
    scorer: str
    options: dict[str, float]
    routing: Routing
    num_experts: int
    layers: tuple[int, ...]
    counts: tuple[int, ...]
    classes: tuple[str, ...]
    tokens: list[list[float]]
    sums: list[list[list[list[float]]]]
    gate_scale: GateScale = "survivors"
    seen: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.counts), len(self.classes), 2)
        whole = list(self.counts) == sorted(set(self.counts)) and self.counts and self.counts[0] > 0
        if not whole or self.counts[-1] >= self.num_experts:
            raise UsageError("Counts of layer curves must ascend from 1 or more and stay below the number of experts.")
        if np.shape(self.sums) != shape or np.shape(self.tokens) != shape[2:] or np.sum(self.tokens) <= 0:
            raise UsageError("Layer curves must hold a sum for every layer, count, class and half, over some tokens.")
        if np.min(self.tokens) < 0:
            raise UsageError("Layer curves must not hold negative numbers of tokens.")
        if list(self.layers) != sorted({*self.layers}) or len({*self.classes}) < len(self.classes):
            raise UsageError("Layers of layer curves must ascend, and their classes differ.")

    def by_class(self, half: int | None = None) -> NDArray[np.float64]:
        """``K_c[l][n]`` in nats, float64 [C, L, E + 1], infinite below the smallest measured count.

        Args:
            half: of the even (0) or the odd (1) folds of the examples alone. A class without tokens costs nothing.
        """
        sums, tokens = np.asarray(self.sums, dtype=np.float64), np.asarray(self.tokens, dtype=np.float64)
        sums, tokens = (a.sum(axis=-1) if half is None else a[..., half] for a in (sums, tokens))
        mean = np.divide(sums, tokens, out=np.zeros_like(sums), where=tokens > 0)
        rising = np.maximum.accumulate(np.maximum(mean, 0)[:, ::-1], axis=1)[:, ::-1]
        grid, every = [*self.counts, self.num_experts], np.arange(self.num_experts + 1)
        curves = [
            [np.interp(every, grid, [*rising[row, :, place], 0.0]) for row in range(len(self.layers))]
            for place in range(len(self.classes))
        ]
        found = np.asarray(curves)
        found[:, :, : self.counts[0]] = np.inf
        return found

    def costs(self, half: int | None = None) -> NDArray[np.float64]:
        """``max_c K_c[l][n]``, float64 [L, E + 1]: a layer costs what it costs the class that needs it most."""
        return np.asarray(self.by_class(half).max(axis=0))

    def has_half(self, half: int) -> bool:
        """Whether a half of the examples has tokens."""
        return bool(np.asarray(self.tokens)[:, half].sum() > 0)

    def covers(self, selection: Selection) -> bool:
        """Whether these are curves of the model's layers that a selection is for."""
        own = (self.fingerprint, self.layers, self.num_experts)
        return own == (selection.fingerprint, tuple(selection.layers), selection.num_experts)

    def predicted(self, counts: Iterable[int]) -> dict[str, float]:
        """The sum over layers that each class is predicted to lose, in nats, when layers keep so many experts.

        That layers add up is a heuristic.
        """
        kept = np.asarray(list(counts))
        rows = np.arange(len(self.layers))
        return {name: float(k[rows, kept].sum()) for name, k in zip(self.classes, self.by_class(), strict=True)}

    def check(self, info: TraceInfo, method: Method, options: dict[str, float]) -> None:
        """Check that the curves were measured for what they are used for.

        Args:
            info: of the trace that they are used with.
            method: what is asked of a selection.
            options: how tokens weigh in it, and its seed.

        Raises:
            FingerprintError: when they are of another model, or of other layers or experts than it has.
            UsageError: when layers were cut by another scorer, other weights or in another routing.
        """
        if info.fingerprint != self.fingerprint:
            raise FingerprintError(f"The layer curves are of another model ({self.model}).")
        if (info.layers, info.num_experts) != (self.layers, self.num_experts):
            raise FingerprintError(
                f"The layer curves are damaged: they have {len(self.layers)} layers of {self.num_experts} experts with "
                f"other numbers than the trace, which has {len(info.layers)} of {info.num_experts}; measure them anew."
            )
        own = Method(self.scorer, "measured", self.routing, gate_scale=self.gate_scale)
        asked = (method.scorer, method.routed, options)
        if (self.scorer, own.routed, self.options) != asked:
            weights = ", ".join(f"{name} {value:g}" for name, value in self.options.items())
            raise UsageError(
                f"The layer curves were measured for scorer {self.scorer}, routing {own.routed} ({weights}); "
                "measure them for what is asked here with `shape-moe measure`."
            )

    def save(self, file: str | PathLike[str]) -> None:
        """Write the curves."""
        write_text(Path(file), json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}) + "\n")


def load_curves(path: str | PathLike[str]) -> LayerCurves:
    """Read a file of layer curves.

    Raises:
        CheckpointError: when it is missing, damaged or written by another version.
    """
    file = Path(path)
    document = read_json(file)
    if document.pop("format_version", None) != FORMAT_VERSION:
        raise CheckpointError(f"{file} holds no layer curves, or was written in another format version.")
    try:
        return as_shape(document, LayerCurves, file, "a file of layer curves")
    except UsageError as error:
        raise CheckpointError(f"{file} is no file of layer curves: {error}") from error


def counts_to_measure(experts: int, floor: int, groups: int = 1, most: int | None = None) -> tuple[int, ...]:
    """Counts at which a layer is measured, ascending: the floor, and parts of the layer above it.

    Args:
        experts: routed experts per layer.
        floor: fewest that a layer may keep.
        groups: router groups that keep equal counts.
        most: how many counts at most, at least 2, spread evenly over all; None for all.
    """
    wanted = {floor, *(experts * part // 32 for part in _GRID)}
    snapped = {-(-count // groups) * groups for count in wanted if count >= floor}
    every = sorted(count for count in snapped if count < experts)
    if most is None or most >= len(every):
        return tuple(every)
    last = len(every) - 1
    return tuple(every[(last * place + (most - 1) // 2) // (most - 1)] for place in range(most))


def cheapest_counts(
    costs: NDArray[np.float64], budget: int, room: Room, most: Sequence[int] | None = None
) -> list[int]:
    """Experts per router group that each layer keeps, at the least total cost of all ways to spend a budget.

    Exact, by dynamic programming over layers and chunks. Between equal totals, later layers keep fewer.

    Args:
        costs: float64 [L, E + 1], what a layer costs when it keeps so many experts.
        budget: experts to keep over all layers; feasible in ``room``.
        room: what constraints leave open.
        most: experts that each layer keeps at most, None for no further limit.

    Raises:
        UsageError: when every way needs a layer with fewer experts than were measured.
    """
    counts, groups = list(room.base), room.rules.groups
    chunks = (budget - sum(counts) * groups) // room.chunk
    if room.rules.equal:
        return [count + chunks * room.step for count in counts]
    best = np.full(chunks + 1, np.inf)
    best[0] = 0.0
    taken: list[tuple[int, NDArray[np.int64]]] = []
    for row in room.open_rows:
        ceiling = room.most if most is None else most[row] // groups
        options = np.arange(counts[row], ceiling + 1, room.step) * groups
        least, choice = np.full(chunks + 1, np.inf), np.zeros(chunks + 1, dtype=np.int64)
        for extra, cost in enumerate(costs[row, options][: chunks + 1]):
            total = best[: chunks + 1 - extra] + cost
            better = total < least[extra:]
            least[extra:][better] = total[better]
            choice[extra:][better] = extra
        best = least
        taken.append((row, choice))
    if not np.isfinite(best[chunks]):
        raise UsageError("The layer curves were not measured for so few experts per layer; measure them anew.")
    for row, choice in reversed(taken):
        counts[row] += int(choice[chunks]) * room.step
        chunks -= int(choice[chunks])
    return counts


def choose_by_curves(
    costs: NDArray[np.float64],
    budget: int,
    room: Room,
    ranks: NDArray[np.int64],
    most: Sequence[int] | None = None,
) -> NDArray[np.bool_]:
    """Keep ``budget`` experts: in each layer its best ranked, as many as is cheapest.

    Args:
        costs: float64 [L, E + 1].
        budget: experts to keep over all layers.
        room: what constraints leave open.
        ranks: int [L, E], 0 for the best of a layer.
        most: experts that each layer keeps at most; None for no further limit.

    Returns:
        bool [L, E], True for kept.

    Raises:
        BudgetError: when no selection of that size respects the constraints.
        UsageError: when the curves do not reach as far down as the budget needs.
    """
    counts = cheapest_counts(costs, room.feasible(budget), room, most)
    return room.kept(room.order(ranks.astype(np.float64), ranks), counts)
