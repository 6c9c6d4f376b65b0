"""Classes that records name themselves: a mixed file usually says in a field which task each record belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shape_moe.calibration.records import Record

LABELS = ("task", "category", "domain", "dataset", "subset", "source", "topic", "type", "language")
"""Fields that name a record's class, the first that does so for all records."""
MOST_NAMED = 16
"""A field with more values than this names something else."""
FEWEST_NAMED = 4
"""A class of fewer records than this would be scored by chance, and could not be judged."""
Labels = Mapping[str, str]


def labels_of(row: Mapping[str, Any], fields: Mapping[str, str] | None) -> Labels:
    """What a raw row says in the fields of :data:`LABELS` that nothing else is read from."""
    used = set((fields or {}).values())
    found = {name: row.get(name) for name in LABELS if name not in used}
    return {name: value for name, value in found.items() if isinstance(value, str) and value}


def in_named_classes(
    records: Sequence[Record], labels: Mapping[int, Labels], label: str | None
) -> tuple[list[Record], str | None]:
    """Records with the classes that they name, and the field that names them.

    Args:
        records: the records.
        labels: what their rows say, by the records' index.
        label: the field, None to find one, empty for no classes.

    Returns:
        The records, and the field; None where there is no class to tell from another.
    """
    if label is None:
        label = next((name for name in LABELS if _names_classes(name, records, labels)), "")
    if not label:
        return list(records), None
    return [replace(record, group=labels.get(record.index, {}).get(label)) for record in records], label


def _names_classes(name: str, records: Sequence[Record], labels: Mapping[int, Labels]) -> bool:
    values = Counter(labels.get(record.index, {}).get(name) for record in records)
    return None not in values and 2 <= len(values) <= MOST_NAMED and min(values.values()) >= FEWEST_NAMED
