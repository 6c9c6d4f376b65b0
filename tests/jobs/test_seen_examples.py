"""Examples that calibrated, looked at again for a suspicion."""

from __future__ import annotations

from dataclasses import replace

from shape_moe.calibration.parts import Parts
from shape_moe.calibration.records import Record
from shape_moe.jobs.seen_examples import MOST_SEEN, seen_records


def records(group: str | None, count: int, start: int = 0) -> list[Record]:
    return [
        Record(i, f"line {i}", prompt=f"{group} {i}", response="x", group=group) for i in range(start, start + count)
    ]


def parts(calibration, report, choice=()) -> Parts:
    return Parts(list(calibration), list(choice), list(report), {}, "")


def test_classes_with_few_records_of_their_own_are_looked_at_again() -> None:
    """Not those with thirty to report by, nor with too few to be judged at all."""
    known = [*records("few", 40), *records("many", 10, 100), *records("none", 10, 200)]
    report = [*records("few", 29, 300), *records("many", 30, 400), *records("none", 3, 500)]
    found = seen_records(parts(known, report))
    assert [record.index for record in found] == list(range(MOST_SEEN))
    chosen_by = records("few", 5, 600)
    assert [record.index for record in seen_records(parts([], report, chosen_by))] == list(range(600, 605))


def test_without_classes_nothing_is_looked_at_again() -> None:
    assert seen_records(parts(records(None, 20), records(None, 10, 100))) == []


def test_records_without_an_answer_to_compare_are_left_out() -> None:
    calling = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]})
    known = [
        Record(0, "line 0", prompt="open", group="a"),
        Record(1, "line 1", text="a text", group="a"),
        Record(2, "line 2", messages=calling, group="a"),
        replace(records("a", 1)[0], index=3),
    ]
    found = seen_records(parts(known, [*records("a", 10, 10), *records("b", 10, 30)]))
    assert [record.index for record in found] == [3]
