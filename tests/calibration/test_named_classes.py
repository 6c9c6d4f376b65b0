"""A mixed file that says in a field which task each record belongs to."""

from __future__ import annotations

import pytest

from shape_moe.calibration.reading import load
from shape_moe.calibration.records import DataOptions
from shape_moe.jobs.judgement import JudgementOptions, set_aside
from support.data import write_lines


def rows(field: str, *values: object, each: int = 6) -> list[dict]:
    return [
        {"prompt": f"{value} {i}", "response": "yes", **({} if value is None else {field: value})}
        for i in range(each)
        for value in values
    ]


def groups(data: object, **options) -> set[str | None]:
    return {record.group for record in load(DataOptions.of(data, **options)).records}


@pytest.mark.parametrize("field", ["task", "category", "source", "language", "role"])
def test_a_field_names_the_classes(field) -> None:
    loaded = load(DataOptions.of(rows(field, "maths", "code")))
    assert loaded.label == field
    assert all(record.prompt.split()[0] == record.group for record in loaded.records)
    assert loaded.said[-1] == f"Classes by field {field!r}: code 6, maths 6 (--stratify none makes them one)."


def test_the_first_field_that_tells_all_records_apart_is_taken() -> None:
    both = [{**row, "task": "chat"} for row in rows("domain", "maths", "code")]
    assert groups(both) == {"maths", "code"}
    half = [*rows("task", "maths", "code"), *rows("task", None)]
    assert groups([{**row, "domain": row["prompt"].split()[0]} for row in half]) == {"maths", "code", "None"}


@pytest.mark.parametrize(
    "data",
    [
        rows("task", "maths"),
        rows("task", "maths", None),
        rows("task", *(f"t{i}" for i in range(17))),
        rows("task", "maths", "code", each=3),
        rows("id", "a", "b"),
        rows("task", 1, 2),
    ],
    ids=["one value", "not in all records", "too many values", "too few of each", "another field", "numbers"],
)
def test_what_names_no_classes(data) -> None:
    assert groups(data) == {None}


def test_what_is_said_otherwise_goes_first(tmp_path) -> None:
    data = rows("task", "maths", "code")
    assert groups(data, label="") == {None}
    assert groups([{**row, "kind": "x"} for row in data], stratify="kind") == {"x"}
    assert groups(data, fields={"response": "task"}) == {None}
    files = [str(write_lines(tmp_path / f"{name}.jsonl", data)) for name in ("a", "b")]
    assert groups(files[0], also=(files[1],)) == {"a", "b"}


def test_what_calibrates_and_what_reports_have_the_same_classes() -> None:
    """A field that names classes of the whole source alone names none, and the other way round."""
    many = DataOptions.of(rows("task", "maths", "code", each=30), samples=20)
    parts = set_aside(many, JudgementOptions(), give_up=False)
    for part in (parts.calibration, parts.report):
        assert {record.group for record in part} == {"maths", "code"}
    few = DataOptions.of(rows("task", "maths", "code", each=30), samples=5)
    parts = set_aside(few, JudgementOptions(), give_up=False)
    for part in (parts.calibration, parts.report):
        assert {record.group for record in part} == {None}


def said(*data: dict, **options) -> str:
    return " ".join(load(DataOptions.of(list(data), **options)).said)


def chats(*systems: str, each: int = 5) -> list[dict]:
    return [
        {"messages": [{"role": "system", "content": s}, {"role": "user", "content": f"{s[-2:]}{i}?"}, ANSWER]}
        for i in range(each)
        for s in systems
    ]


ANSWER = {"role": "assistant", "content": "yes"}


def test_prompts_of_a_few_kinds_without_a_field_are_told_of() -> None:
    bare = [{"prompt": row["prompt"], "response": "yes"} for row in rows("task", "add", "words")]
    assert "2 different first words: 'add' (6), 'words' (6). " in said(*bare)
    assert "--stratify FIELD" in said(*bare)
    assert groups(bare) == {None}
    long = "You are a patient teacher of mathematics who explains every step."
    told = said(*chats("You write SQL.", long))
    assert "2 different system prompts: 'You write SQL.' (5), 'You are a patient teacher of mathematics...' (5)" in told


@pytest.mark.parametrize(
    "data",
    [
        rows("task", "maths", "code"),
        [{"prompt": f"{word} it", "response": "yes"} for word in "abcdefg" for _ in range(5)],
        [{"prompt": f"{word} it", "response": "yes"} for word in ("a", "a", "a", "a", "b")],
        [{"prompt": f"do {i}", "response": "yes"} for i in range(12)],
        chats(*(f"{i}" for i in range(7))),
    ],
    ids=["a field names them", "too many", "too few of one", "all alike", "too many system prompts"],
)
def test_prompts_of_one_kind_or_of_many_are_not_told_of(data) -> None:
    assert "No field names classes" not in said(*data)


def test_whoever_says_how_classes_are_made_is_not_told() -> None:
    bare = [{"prompt": row["prompt"], "response": "yes", "kind": "x"} for row in rows("task", "add", "words")]
    assert "No field" not in said(*bare, label="")
    assert "No field" not in said(*bare, stratify="kind")
