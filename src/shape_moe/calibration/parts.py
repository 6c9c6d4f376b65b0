"""A user's examples in three parts that share no prompt: to calibrate, to choose by, and to report by."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shape_moe.calibration.records import Record, prompt_hash
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.calibration.split import split_records
from shape_moe.units import counted

FEWEST = 4
"""A class with fewer examples to report by is not measured."""
MOST = 400
"""More examples than this are not needed to report by: 381 that agree show that at most 1 % is lost."""
MOST_GIVEN_UP = 64
"""At most this many examples of a class are taken from the calibration sample."""
SHARE_GIVEN_UP = 5
"""One in so many examples of the calibration sample is given up where there are no others."""


@dataclass(frozen=True)
class Parts:
    """Records for three purposes; what was used to choose never reports.

    Attributes:
        calibration: to trace.
        choice: to choose scorer, rule, routing or keep rate by; empty where nothing is chosen.
        report: to report by.
        unmeasured: classes with too few records to report by (the empty name stands for all records together), and
            why.
        sentence: how they were told apart, for people.
    """

    calibration: list[Record]
    choice: list[Record]
    report: list[Record]
    unmeasured: dict[str, str]
    sentence: str


def three_parts(
    wanted: Sequence[Record],
    beyond: Sequence[Record] = (),
    *,
    calibration: int,
    choice: int = 0,
    most: int = MOST,
    give_up: bool = True,
    seed: int = 0,
) -> Parts:
    """Tell records to report by from those that the job works with, and those to choose by from the rest.

    Of every class, records beyond those wanted come first. Where they are fewer than a fifth of the class (at most
    64), as many of the wanted ones as are missing are given up for them.

    Args:
        wanted: the records that the job would work with if it did not report.
        beyond: others of the same source, where it has more.
        calibration: how many to calibrate with at most.
        choice: how many to choose by at most; 0 where nothing is chosen.
        most: how many to report by at most, over all classes.
        give_up: whether wanted records may be given up; a preset that names its sample forbids it.
        seed: draws the parts.

    Raises:
        DataError: when something is to be chosen and too few records are left for that.
    """
    kept, spare = _by_prompt(wanted), _by_prompt(beyond)
    spare = {key: records for key, records in spare.items() if key not in kept}
    groups = sorted({_group(records) for records in (*kept.values(), *spare.values())})
    given_up: set[str] = set()
    report: list[Record] = []
    unmeasured = {}
    for group in groups:
        mine, others = (_shuffled(prompts, group, seed) for prompts in (kept, spare))
        limit = max(most // len(groups), FEWEST)
        missing = min(len(mine) // SHARE_GIVEN_UP, MOST_GIVEN_UP, limit) - len(others) if give_up else 0
        taken = mine[: max(missing, 0)]
        reporting = (others + taken)[:limit]
        if len(reporting) < FEWEST:
            unmeasured[group] = _too_few(len(mine) + len(others), others=len(others), give_up=give_up)
            continue
        given_up.update(taken)
        report += [(kept.get(key) or spare[key])[0] for key in reporting]
    rest = [record for record in wanted if prompt_hash(record) not in given_up]
    report.sort(key=lambda record: record.index)
    said = _sentence(report, len(given_up))
    if not choice:
        return Parts(rest[:calibration], [], report, unmeasured, said)
    split = split_records(rest, calibration, choice, seed=seed)
    return Parts(split.calibration, split.held_out, report, unmeasured, f"{split.sentence}; {said}")


def without_seen(parts: Parts, seen: SeenPrompts, made: str) -> Parts:
    """Parts that do not report by what has been seen elsewhere.

    Args:
        parts: the parts.
        seen: prompts that something was made from.
        made: what that is.
    """
    left = [record for record in parts.report if record not in seen]
    if len(left) == len(parts.report):
        return parts
    counts = Counter(record.group or "" for record in left)
    classes = {record.group or "" for record in parts.report}
    too_few = f"too few examples are left that had no part in the {made}"
    unmeasured = {group: too_few for group in sorted(classes) if counts[group] < FEWEST}
    report = [record for record in left if (record.group or "") not in unmeasured]
    more = f"{counted(len(parts.report) - len(left), 'more example')} had a part in the {made} and were left out"
    said = f"{_sentence(report, 0)}; {more}"
    return replace(parts, report=report, unmeasured={**parts.unmeasured, **unmeasured}, sentence=said)


def _by_prompt(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[prompt_hash(record)].append(record)
    return dict(found)


def _group(records: list[Record]) -> str:
    return records[0].group or ""


def _shuffled(prompts: dict[str, list[Record]], group: str, seed: int) -> list[str]:
    """The prompts of a class, in an order that the records' own does not decide."""
    found = sorted(key for key, records in prompts.items() if _group(records) == group)
    random.Random(f"{seed}/{group}").shuffle(found)  # noqa: S311 -- a sample, not a secret
    return found


def _too_few(prompts: int, *, others: int, give_up: bool) -> str:
    if give_up:
        return (
            f"{counted(prompts, 'different prompt')} are too few to calibrate with some and report by others: "
            f"{FEWEST * SHARE_GIVEN_UP} are needed"
        )
    left = f"only {counted(others, 'other prompt')}" if others else "no other prompts"
    return f"the calibration sample is kept whole, and the data holds {left}"


def _sentence(report: list[Record], given_up: int) -> str:
    if not report:
        return "no examples to report by"
    text = f"{counted(len(report), 'example')} to report by, which nothing else has seen"
    return f"{text} ({given_up} of them given up by the calibration sample)" if given_up else text
