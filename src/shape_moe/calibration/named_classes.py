"""Classes that records name themselves: a mixed file usually says in a field which task each record belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shape_moe.calibration.records import Record

LABELS = ("task", "category", "domain", "dataset", "subset", "source", "topic", "type", "language", "role")
"""Fields that name a record's class, the first that does so for all records."""
MOST_NAMED = 16
"""A field with more values than this names something else."""
FEWEST_NAMED = 4
"""A class of fewer records than this would be scored by chance, and could not be judged."""
MOST_KINDS = 6
"""More different beginnings than this are prompts of all kinds."""
Labels = Mapping[str, str]
_SYSTEM = ("system", "developer")
_SHOWN = 40


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


def unnamed_kinds(records: Sequence[Record]) -> str | None:
    """What to say of records that no field tells apart, but their beginnings do; None where they do not.

    Beginnings are the system prompts where all records have one, else the first words of the prompts: of each there
    are few, and several records begin with each. That proves no classes, and makes none.
    """
    conversations = [record.messages for record in records if record.messages]
    systems = [str(turns[0].get("content") or "") for turns in conversations if turns[0]["role"] in _SYSTEM]
    for what, found in (("system prompts", systems), ("first words", [_first_word(record) for record in records])):
        counts = Counter(found)
        if len(found) < len(records) or not 2 <= len(counts) <= MOST_KINDS or min(counts.values()) < FEWEST_NAMED:
            continue
        shown = ", ".join(f"{_short(name)} ({count})" for name, count in counts.most_common())
        return (
            f"No field names classes, but the records have {len(counts)} different {what}: {shown}. If these are "
            "different tasks, each is kept for its own sake only where it is a class: name a field that tells them "
            "apart (--stratify FIELD), or give each a file of its own (several --data)."
        )
    return None


def _first_word(record: Record) -> str:
    turns = record.messages or ()
    said = next((turn.get("content") for turn in turns if turn["role"] == "user"), record.prompt or record.text)
    return next(iter(str(said or "").split()), "")


def _short(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN].rstrip()}...")


def _names_classes(name: str, records: Sequence[Record], labels: Mapping[int, Labels]) -> bool:
    values = Counter(labels.get(record.index, {}).get(name) for record in records)
    return None not in values and 2 <= len(values) <= MOST_NAMED and min(values.values()) >= FEWEST_NAMED
