"""Classes of a trace: groups of examples whose sums are kept apart, so that none is paid for with another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shape_moe.calibration.sources import IN_MEMORY
from shape_moe.errors import UsageError
from shape_moe.tracing.coalitions import CoalitionTable
from shape_moe.tracing.statistics import MOST_CLASSES
from shape_moe.tracing.stored_statistics import Array, PartOf

if TYPE_CHECKING:
    from shape_moe.calibration.examples import Example
    from shape_moe.tracing.trace import Trace, TraceInfo

NO_CLASS = ""
"""The class of examples that have none."""


def classes_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """Names of the classes of examples, ascending.

    Raises:
        UsageError: when there are too many.
    """
    names = tuple(sorted({example.group or NO_CLASS for example in examples})) or (NO_CLASS,)
    check_classes(names)
    return names


def check_classes(names: Collection[str]) -> None:
    """Refuse more classes than a trace keeps apart.

    Raises:
        UsageError: naming how many there are.
    """
    if len(names) > MOST_CLASSES:
        raise UsageError(
            f"The examples form {len(names):,} classes, and a trace keeps at most {MOST_CLASSES} apart: "
            "choose a field with fewer values for --stratify, or leave it out."
        )


def class_names(infos: Sequence[TraceInfo], *, pool: bool = False) -> list[tuple[str, ...]]:
    """What the classes of several traces are called once they are put together.

    A trace without classes is the class of its data, where the others are of other data; with ``pool`` it has none.
    """
    if pool:
        return [info.classes for info in infos]
    bare = [_data_name(info.source) if info.classes == (NO_CLASS,) else None for info in infos]
    if len(set(bare)) == 1 and bare[0] is not None:
        return [info.classes for info in infos]
    return [info.classes if name is None else (name,) for info, name in zip(infos, bare, strict=True)]


def _data_name(source: Mapping[str, Any]) -> str:
    if "merged" in source:
        return " + ".join(dict.fromkeys(_data_name(part) for part in source["merged"]))
    name = str(source.get("data", NO_CLASS))
    return f"{name}, {str(source.get('content_hash', ''))[-8:]}" if name == IN_MEMORY else name


def in_classes(trace: Trace, names: tuple[str, ...], classes: tuple[str, ...]) -> Trace:
    """A trace whose classes, called ``names``, have the places that they have among ``classes``."""
    if names == classes:
        return replace(trace, info=replace(trace.info, classes=classes))
    places = np.array([classes.index(name) for name in names], dtype=np.int64)

    def spread(array: Array) -> Array:
        wide = np.zeros((len(array), len(classes), *array.shape[2:]), dtype=array.dtype)
        wide[:, places] = array
        return wide

    tables = {
        layer: CoalitionTable(table.members, table.counts, places[table.classes])
        for layer, table in trace.coalitions.items()
    }
    info = replace(trace.info, classes=classes)
    return replace(trace, info=info, statistics=PartOf(trace.statistics, spread), coalitions=tables)
