"""Examples that a model was made from, looked at again where a class has few others: they may raise a suspicion.

They flatter the model, so that they never clear one, and count for no other figure.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from shape_moe.calibration.parts import FEWEST, Parts
from shape_moe.calibration.records import Record
from shape_moe.evaluation.outcomes import FEW
from shape_moe.evaluation.tool_check import calls_tools

MOST_SEEN = 32
"""At most so many examples of a class that calibration has seen are looked at again."""


def seen_records(parts: Parts) -> list[Record]:
    """Records that calibrated or that something was chosen by, of the classes that have few records to report by.

    Left out are records without an answer of their own (what the dense model answered agrees with what was kept for
    it), texts, and answers that call tools, which count by themselves.
    """
    reporting = Counter(record.group for record in parts.report)
    if len(reporting) < 2:  # where there are no classes, none can be suspected
        return []
    found: dict[str | None, list[Record]] = defaultdict(list)
    for record in (*parts.calibration, *parts.choice):
        answered = record.text is None and not record.lacks_response and not calls_tools(record)
        few = FEWEST <= reporting[record.group] < FEW
        if answered and few and len(found[record.group]) < MOST_SEEN:
            found[record.group].append(record)
    return sorted((record for records in found.values() for record in records), key=lambda record: record.index)
