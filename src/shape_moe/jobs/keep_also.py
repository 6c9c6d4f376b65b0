"""General skills that a pruned model shall keep: their prompts calibrate as well, each group as a class of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shape_moe.calibration.records import DataOptions, Record, short_name
from shape_moe.evaluation.forgotten import general_records, group_names

FIRST_INDEX = 2**40
"""General prompts are numbered from here, beyond the records of any file."""
_CLASS = "general "


def with_general(records: Sequence[Record], groups: Sequence[str], data: DataOptions) -> list[Record]:
    """Records of the user's data, after general prompts that the model answers itself.

    The general prompts come first, so that a limit of tokens never leaves them out. Records without a class are then
    the class of their source.

    Args:
        records: the records of the user's data.
        groups: groups of general prompts; none leaves the records as they are.
        data: where the records come from.

    Raises:
        UsageError: for a group that does not exist.
    """
    if not groups:
        return list(records)
    general = [
        replace(record, index=FIRST_INDEX + record.index, group=f"{_CLASS}{record.group}")
        for record in general_records(group_names(groups))
    ]
    own = short_name(data.source)
    return [*general, *(record if record.group else replace(record, group=own) for record in records)]
