"""Rows of every shape, as documented; and that nothing which means something is dropped in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shape_moe.calibration.reading import load
from shape_moe.calibration.records import DataOptions, Record, content_hash, prompt_hash
from shape_moe.calibration.shapes import FORMATS, normalise
from shape_moe.errors import DataError, ShapeMoeError
from support.data import write_lines

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
DOCUMENTED = [
    (name, line)
    for name, block in re.findall(r"^\*\*`(\w+)`\*\*.*?```json\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_the_page_shows_every_shape() -> None:
    assert [name for name in FORMATS if name not in dict(DOCUMENTED)] == []


@pytest.mark.parametrize(("name", "line"), DOCUMENTED)
def test_documented_examples(name, line) -> None:
    row = json.loads(line)
    found = normalise(row, "line 1")
    assert found == normalise(row, "line 1", form=name)
    assert found.unread == ()
    others = [form for form in FORMATS if form != name]
    for form in others:
        if not {"prompt", "preference"} >= {name, form}:  # a pair with a prompt is a prompt as well
            with pytest.raises(DataError, match=f"--format {form} needs the field"):
                normalise(row, "line 1", form=form)


def test_unread_fields_are_named() -> None:
    assert normalise({"messages": TALK, "text": "hi yo"}, "r").unread == ("text",)
    assert normalise({"prompt": "a", "response": "b", "answer": "c"}, "r").unread == ("answer",)
    assert normalise({"text": "a", "label": 1, "id": 7}, "r").unread == ("label",)
    weighted = [TALK[0], {**TALK[1], "weight": 0}]
    assert normalise({"messages": weighted}, "r").unread == ("weight of messages",)
    assert normalise({"messages": TALK, "prompt": "hi"}, "r").unread == ()  # the question once more
    assert normalise({"messages": TALK, "chosen": TALK, "rejected": TALK, "prompt": "hi"}, "r").unread == ()
    with pytest.raises(DataError, match="only one of messages and prompt; .*--format messages or --format prompt"):
        normalise({"messages": TALK, "prompt": "something else"}, "r")


@pytest.mark.parametrize(
    ("key", "meant"),
    [("respnse", "response"), ("Response", "response"), ("completions", "completion"), ("anwser", "answer")],
)
def test_a_misspelt_response_is_not_written_by_the_model(key, meant) -> None:
    for row in ({"prompt": "hi", key: "yo"}, {"instruction": "hi", key: "yo"}):
        with pytest.raises(
            DataError, match=f"no response, but a field '{key}'; did you mean '{meant}'.*response={key}"
        ):
            normalise(row, "line 1")
    assert normalise({"prompt": "hi", key: "yo"}, "r", {"response": key}).content["response"] == "yo"
    for row in (
        {"prompt": "hi", "response": "yo", key: "x"},
        {"prompt": "hi", "answer_id": "7"},
        {"prompt": "hi", key: 1},
    ):
        assert normalise(row, "r").content["prompt"] == "hi"


def test_spellings_of_one_conversation_are_one_record() -> None:
    """Arguments as text or object, tools with or without their wrapping, roles of any dialect: one content hash."""
    tool = {"name": "f", "parameters": {}}
    ours = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"k": 1}}}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "yo"},
        ],
        "tools": [{"type": "function", "function": tool}],
    }
    theirs = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"k\\": 1}"}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "yo"},
        ],
        "tools": json.dumps([tool]),
    }
    legacy = {
        "messages": json.dumps(
            [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"k": 1}'}},
                {"role": "function", "content": "2"},
                {"role": "assistant", "content": "yo"},
            ]
        ),
        "functions": [tool],
    }
    hashes = {content_hash([record_of(row)]) for row in (ours, theirs, legacy)}
    assert len(hashes) == 1
    assert content_hash([record_of({**ours, "tools": None})]) not in hashes


def record_of(row) -> Record:
    content = normalise(row, "r").content
    tools = tuple(content["tools"]) if content["tools"] else None
    return Record(0, "r", messages=tuple(content["messages"]), tools=tools)


def test_what_is_asked_holds_the_calls_before() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"k": 1}}}
    turns = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    other = [*turns[:1], {**turns[1], "tool_calls": [{**call, "function": {"name": "g", "arguments": {}}}]}, turns[2]]
    first, second = (prompt_hash(Record(0, "r", messages=(*talk, TALK[1]))) for talk in (turns, other))
    assert first != second
    assert first == prompt_hash(Record(0, "r", messages=(*turns, {"role": "assistant", "content": "else"})))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "messages",
        "conversations",
        "chosen",
        "instruction",
        "prompt",
        "response",
        "completion",
        "text",
        "tools",
        "system",
    ]
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "tool_calls", "function_call", "reasoning_content"]),
    st.sampled_from(["user", "assistant", "tool", "human", "gpt"]) | JSON,
    max_size=4,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
@given(row=st.dictionaries(KEYS, JSON | st.lists(MESSAGE, max_size=3), max_size=4))
def test_whatever_a_row_holds_is_read_or_refused(row) -> None:
    """Never another error, and never content that is not what the schema says."""
    try:
        content = normalise(row, "line 1").content
    except DataError as error:
        assert str(error).startswith("line 1")
        return
    assert sum(content[name] is not None for name in ("text", "prompt", "messages")) == 1
    json.dumps(content).encode()


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "\\ud800"}',
        "{" * 3000,
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"text": 1' + "0" * 6000 + "}",
        '{"prompt": "a", "tools": [{"name": "f", "x": 1e999}]}',
        '{"prompt": "a", "tools": [{"name": "f", "x": NaN}]}',
    ],
)
def test_hostile_lines(tmp_path, line) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(line + '\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl, line 1: "):
        load(DataOptions(str(file)))
    loaded = load(DataOptions(str(file), skip_bad=True))
    assert [record.text for record in loaded.records] == ["fine"]
    assert list(loaded.skipped) == [f"{file}, line 1"]


def test_a_bad_row_gives_way_to_another(tmp_path) -> None:
    rows = [{"text": f"t{i}"} if i % 3 else {"other": i} for i in range(30)]
    options = DataOptions(str(write_lines(tmp_path / "d.jsonl", rows)), samples=15, skip_bad=True)
    loaded = load(options)
    assert len(loaded.records) == 15
    assert loaded.skipped
    assert all(record.index % 3 for record in loaded.records)
    everything = load(DataOptions(str(tmp_path / "d.jsonl"), samples=25, skip_bad=True))
    assert (len(everything.records), len(everything.skipped)) == (20, 10)
    with pytest.raises(ShapeMoeError, match="none of 1 record can be used; the first: .*line 1"):
        load(DataOptions(str(write_lines(tmp_path / "e.jsonl", rows[:1])), skip_bad=True))


@pytest.mark.parametrize(
    ("counts", "samples", "weights", "expected"),
    [
        ((12, 4), 6, (), [3, 3]),
        ((12, 4), 10, (), [6, 4]),
        ((12, 4), None, (), [12, 4]),
        ((12, 4), 9, (2, 1), [6, 3]),
        ((12, 4), None, (1, 1), [4, 4]),
        ((25, 25), 128, (1, 2), [12, 25]),
        ((3, 3), 1, (1, 1000), [1, 1]),
    ],
)
def test_shares_of_several_sources(tmp_path, counts, samples, weights, expected) -> None:
    files = [
        str(write_lines(tmp_path / f"{'ab'[i]}.jsonl", [{"text": f"{i} {j}"} for j in range(count)]))
        for i, count in enumerate(counts)
    ]
    options = DataOptions(files[0], also=(files[1],), samples=samples, weights=weights)
    records = load(options).records
    assert [sum(record.group == name for record in records) for name in "ab"] == expected
    assert [record.index for record in records] == sorted({record.index for record in records})
