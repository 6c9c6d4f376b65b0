"""What the benchmark recommends, as data: which methods come first where the evidence at hand does not tell them apart.

The figures are those of ``benchmarks/results/method_order.json`` (exact match on six tasks of the embedded model, eight
draws at keep 0.4 and 0.25) and of studies on two further small models that are not part of this package. A small model
is a guide and no proof for a large one, which is why ``auto`` measures, and asks this table only where candidates are
tied within noise or nothing can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shape_moe.selection.method import Method, Routing

SOURCE = "benchmarks/results/method_order.json"
"""Where the order comes from."""


@dataclass(frozen=True)
class Recommended:
    """What comes first from a keep rate upwards.

    Attributes:
        from_keep: the least keep rate that this is for.
        pairs: scorer and rule, best first.
        routings: routings, best first; between equal pairs the first is preferred.
        fixed: scorer and rule for each routing where nothing can be judged, without layer curves.
    """

    from_keep: float
    pairs: tuple[tuple[str, str], ...]
    routings: tuple[Routing, ...]
    fixed: dict[str, tuple[str, str]]


_FIXED = {"drop": ("easy-ep", "coverage"), "reroute": ("replacement", "coverage")}
RAGGED = (
    Recommended(
        0.5,
        (
            ("easy-ep", "coverage"),
            ("replacement", "measured"),
            ("replacement", "coverage"),
            ("contribution", "measured"),
            ("contribution", "coverage"),
            ("shape", "coverage"),
        ),
        ("drop", "reroute"),
        _FIXED,
    ),
    Recommended(
        0.0,
        (
            ("replacement", "measured"),
            ("contribution", "measured"),
            ("easy-ep", "coverage"),
            ("replacement", "coverage"),
            ("contribution", "coverage"),
            ("shape", "coverage"),
        ),
        ("drop", "reroute"),
        _FIXED,
    ),
)
"""For counts that may differ from layer to layer, largest keep rates first."""
STOCK = (
    Recommended(
        0.0,
        (
            ("replacement", "uniform"),
            ("easy-ep", "uniform"),
            ("contribution", "uniform"),
            ("reap", "uniform"),
            ("shape", "uniform"),
        ),
        ("reroute",),
        {"reroute": ("replacement", "uniform")},
    ),
)
"""For equal counts in every layer, which stock models and GGUF files need."""
LAST = ("frequency", "uniform")
"""What any trace allows."""


def recommended_for(keep: float, *, equal_counts: bool) -> Recommended:
    """The entry for a keep rate."""
    return next(entry for entry in (STOCK if equal_counts else RAGGED) if keep >= entry.from_keep)


def in_order(methods: Sequence[Method], keep: float) -> list[Method]:
    """Methods by preference at a keep rate: pairs before routings; what the benchmark does not know comes last."""

    def place(method: Method) -> tuple[int, int, bool]:
        entry = recommended_for(keep, equal_counts=method.equal_counts)
        pair = (method.scorer, method.rule)
        by_pair = entry.pairs.index(pair) if pair in entry.pairs else len(entry.pairs)
        by_routing = entry.routings.index(method.routing) if method.routing in entry.routings else len(entry.routings)
        return by_pair, by_routing, method.gate_scale != "trained"

    return sorted(methods, key=place)


def fixed_method(asked: Method, keep: float, can_use: Callable[[str], bool] = lambda _: True) -> Method:
    """The method for a keep rate where nothing can be judged, in the routing and for the target that are asked for.

    Args:
        asked: says routing and target.
        keep: the keep rate.
        can_use: whether a scorer fits what is there; where the first one does not, the next ones are asked.
    """
    entry = recommended_for(keep, equal_counts=asked.equal_counts)
    simple = [pair for pair in entry.pairs if pair[1] != "measured"]
    pairs = (entry.fixed[asked.routing], *simple)
    scorer, rule = next((pair for pair in pairs if can_use(pair[0])), LAST)
    return replace(asked, scorer=scorer, rule=rule)
