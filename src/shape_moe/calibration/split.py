"""Calibration and held-out records that never share a prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from shape_moe.calibration.records import Record, prompt_hash
from shape_moe.errors import DataError

_FEWEST = 4


@dataclass(frozen=True)
class Split:
    """Records to calibrate with and records to judge by.

    Attributes:
        calibration: the former, in the source's order.
        held_out: the latter, in the source's order.
        sentence: how they were split, for people.
    """

    calibration: list[Record]
    held_out: list[Record]
    sentence: str


def split_records(records: Sequence[Record], calibration: int, held_out: int, *, seed: int = 0) -> Split:
    """Split the records of one source at random; a prompt that occurs twice stays on one side.

    Args:
        records: the records.
        calibration: how many to calibrate with; with too few records both sides shrink alike.
        held_out: how many to judge by.
        seed: draws the sides.

    Raises:
        DataError: when a side would have fewer than 4 different prompts.
    """
    prompts: dict[str, list[Record]] = {}
    for record in records:
        prompts.setdefault(prompt_hash(record), []).append(record)
    order = sorted(prompts)
    random.Random(seed).shuffle(order)  # noqa: S311 -- a sample, not a secret
    wanted = calibration + held_out
    share = min(1.0, len(order) / wanted)
    first, second = round(calibration * share), int(held_out * share)
    if min(first, second) < _FEWEST:
        raise DataError(
            f"There are {len(order)} different prompts, too few to calibrate with some and judge by others: at least "
            f"{2 * _FEWEST} are needed, some hundred are better."
        )
    sides = order[:first], order[first : first + second]
    chosen = [sorted((prompts[key][0] for key in side), key=lambda record: record.index) for side in sides]
    repeated = len(records) - len(order)
    sentence = f"{first} examples to calibrate with and {second} held out, drawn with seed {seed}, no prompt in both"
    sentence += f" ({repeated} records repeat a prompt and were left out)" if repeated else ""
    return Split(chosen[0], chosen[1], sentence)
