"""Records from every format, sampled, and malformed ones named by file and line."""

from __future__ import annotations

import gzip
import json

import datasets
import polars as pl
import pytest

from shape_moe.calibration.reading import load, load_records
from shape_moe.calibration.records import DataOptions, Record, content_hash, prompt_hash
from shape_moe.errors import DataError, UsageError
from support.data import write_lines

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}", "kind": "ab"[i % 2]} for i in range(10)]


def write(tmp_path, name: str):
    file = tmp_path / name
    if name.endswith(".jsonl"):
        file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif name.endswith(".json"):
        file.write_text(json.dumps(ROWS))
    elif name.endswith(".csv"):
        pl.DataFrame(ROWS).write_csv(file)
    elif name.endswith(".parquet"):
        pl.DataFrame(ROWS).write_parquet(file)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(file))
    return str(file)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "folder"])
def test_every_format_gives_the_same_records(tmp_path, name) -> None:
    records = load_records(DataOptions(write(tmp_path, name)))
    assert [(r.prompt, r.response) for r in records] == [(row["prompt"], row["response"]) for row in ROWS]
    expected = load_records(DataOptions(write(tmp_path, "other.jsonl")))
    assert content_hash(records) == content_hash(expected)


def test_splits_of_a_dataset_folder(tmp_path) -> None:
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    )
    splits.save_to_disk(str(tmp_path / "d"))
    assert len(load_records(DataOptions(str(tmp_path / "d"), split="test"))) == 3
    with pytest.raises(DataError, match="no split 'dev'"):
        load_records(DataOptions(str(tmp_path / "d"), split="dev"))


def test_samples_follow_the_seed_and_keep_the_order(tmp_path) -> None:
    source = write(tmp_path, "d.jsonl")
    first = load_records(DataOptions(source, samples=4, seed=1))
    assert [r.index for r in first] == sorted(r.index for r in first)
    assert first == load_records(DataOptions(source, samples=4, seed=1))
    assert any(load_records(DataOptions(source, samples=4, seed=s)) != first for s in range(2, 6))
    assert len(load_records(DataOptions(source, samples=99))) == 10


def test_strata_get_equal_numbers(tmp_path) -> None:
    file = tmp_path / "d.jsonl"
    kinds = ["rare"] * 3 + ["common"] * 30
    file.write_text("\n".join(json.dumps({"text": f"t{i}", "kind": kind}) for i, kind in enumerate(kinds)))
    chosen = load_records(DataOptions(str(file), samples=6, stratify="kind"))
    assert sorted(r.group for r in chosen) == ["common"] * 3 + ["rare"] * 3
    many = load_records(DataOptions(str(file), samples=10, stratify="kind"))
    assert sum(r.group == "rare" for r in many) == 3
    with pytest.raises(DataError, match="line 1.*'topic' to stratify"):
        load_records(DataOptions(str(file), stratify="topic"))


def test_fields_can_have_other_names(tmp_path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "a", "text": 3}))
    records = load_records(DataOptions(str(file), fields={"prompt": "question", "response": "answer", "text": "none"}))
    assert (records[0].prompt, records[0].response) == ("q", "a")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"question": "q"}', "needs one of the fields text, prompt, .*, but has only question; --map prompt=question"),
        ('{"text": "a", "prompt": "b"}', "only one of prompt and text"),
        ('{"prompt": 3}', "'prompt' must be text"),
        ('{"prompt": "a", "response": ["b"]}', "'response' must be text"),
        ('{"text": ""}', "'text' is empty"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"content": "a"}]}', "needs a role"),
        ('{"messages": [{"role": "user", "content": 1}]}', "content that is text"),
    ],
)
def test_malformed_records_name_file_and_line(tmp_path, line, word) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=word) as caught:
        load_records(DataOptions(str(file)))
    assert f"{file}, line 3" in str(caught.value)


def test_malformed_files(tmp_path) -> None:
    cases = {"a.json": ('"text"', "list of records"), "b.json": ("[1]", "record 1"), "c.json": ("[", "line 1")}
    cases |= {"d.csv": ("prompt,response\na\n", "line 2.*number of columns"), "e.parquet": ("no", "readable Parquet")}
    cases |= {"f.doc": ("a", "unknown file type"), "g.jsonl": ("\n", "holds no records")}
    for name, (text, word) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=word):
            load_records(DataOptions(str(tmp_path / name)))


def test_missing_sources(tmp_path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        load_records(DataOptions(str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="no dataset of that name"):
        load_records(DataOptions("nobody/no-such-dataset"))


def test_who_lacks_a_response(tmp_path) -> None:
    file = tmp_path / "d.jsonl"
    rows = [
        {"text": "t"},
        {"prompt": "p"},
        {"prompt": "p", "response": "r"},
        {"messages": [{"role": "user", "content": "u"}]},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert [r.lacks_response for r in load_records(DataOptions(str(file)))] == [False, True, False, True, False]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_other_encodings_name_the_line(tmp_path, name) -> None:
    lines = {
        "d.jsonl": '{"text": "a"}\n{"text": "\xe9"}',
        "d.json": '[{"text": "a"},\n{"text": "\xe9"}]',
        "d.csv": "text\n\xe9",
    }
    (tmp_path / name).write_bytes(lines[name].encode("latin-1"))
    with pytest.raises(DataError, match=f"{name}, line 2: not UTF-8"):
        load_records(DataOptions(str(tmp_path / name)))
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines[name].encode())
    assert load_records(DataOptions(str(tmp_path / name)))[-1].text == "\xe9"  # a byte-order mark is no content


def test_long_and_broken_csv(tmp_path) -> None:
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(load_records(DataOptions(str(tmp_path / "long.csv")))[0].text) == 200_000
    (tmp_path / "broken.csv").write_text('text\n"a"b\n')
    with pytest.raises(DataError, match=r"broken\.csv, line 2: not valid CSV"):
        load_records(DataOptions(str(tmp_path / "broken.csv")))


def test_ambiguous_records_and_unknown_names(tmp_path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a", "prompt": "b"}')
    with pytest.raises(DataError, match="only one of prompt and text; leave all but one out, or .*--format text"):
        load_records(DataOptions(str(file)))
    assert load_records(DataOptions(str(file), fields={"text": "none"}))[0].prompt == "b"
    with pytest.raises(UsageError, match="--map names 'promt'"):
        DataOptions(str(file), fields={"promt": "question"})
    with pytest.raises(UsageError, match="samples must be at least 1"):
        DataOptions(str(file), samples=0)


def prompt_hashes(tmp_path, name: str, rows: list[dict[str, str]]) -> list[str]:
    file = tmp_path / name
    if name.endswith(".csv"):
        pl.DataFrame(rows).write_csv(file)
    else:
        write_lines(file, rows)
    return [prompt_hash(record) for record in load_records(DataOptions(str(file)))]


def test_prompt_hashes_do_not_depend_on_the_format_or_the_response(tmp_path) -> None:
    hashes = prompt_hashes(tmp_path, "d.jsonl", ROWS)
    assert len(set(hashes)) == len(ROWS)
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in hashes)
    assert prompt_hashes(tmp_path, "d.csv", ROWS) == hashes
    assert prompt_hashes(tmp_path, "other.jsonl", [{**row, "response": "another"} for row in ROWS]) == hashes
    assert prompt_hashes(tmp_path, "open.jsonl", [{"prompt": row["prompt"]} for row in ROWS]) == hashes
    assert prompt_hashes(tmp_path, "text.jsonl", [{"text": row["prompt"]} for row in ROWS]) == hashes
    assert not set(prompt_hashes(tmp_path, "new.jsonl", [{"prompt": row["prompt"] + "?"} for row in ROWS])) & set(
        hashes
    )


def test_prompt_hashes_do_not_see_whitespace() -> None:
    for kind in ("prompt", "text"):
        first, second, joined = (Record(i, "r", **{kind: t}) for i, t in enumerate(("a b c", " a  b\r\n\tc\n", "a bc")))
        assert prompt_hash(first) == prompt_hash(second) != prompt_hash(joined)


def test_prompt_hashes_of_conversations() -> None:
    def hashed(*turns: str) -> str:
        messages = (dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns)
        return prompt_hash(Record(0, "r", messages=tuple(messages)))

    asked = hashed("user: a", "assistant: b", "user:  c ")
    assert asked == hashed("user: a", "assistant: b", "user: c", "assistant: d")
    assert asked == hashed("user: a", "assistant: b", "user: c", "assistant: e")
    assert hashed("user: a") == hashed("user: a", "assistant: b") == prompt_hash(Record(0, "r", prompt="a"))
    others = [
        hashed("user: a"),
        hashed("user: c"),
        hashed("user: a", "assistant: x", "user: c"),
        hashed("system: a", "assistant: b", "user: c"),
        hashed("user: a b c"),
    ]
    assert len({asked, *others}) == 6


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_named(tmp_path, name, encoding) -> None:
    file = tmp_path / name
    file.write_text("prompt,response\na,b\n" if name.endswith("csv") else '{"prompt": "a"}\n', encoding=encoding)
    with pytest.raises(DataError, match=r"UTF-16 or UTF-32 text; save the file as UTF-8\.$"):
        load_records(DataOptions(str(file)))


def test_a_table_of_a_spreadsheet_may_have_semicolons(tmp_path) -> None:
    file = tmp_path / "table.csv"
    file.write_text('prompt;response\n"a; b";c, d\n')
    loaded = load(DataOptions(str(file)))
    assert [(record.prompt, record.response) for record in loaded.records] == [("a; b", "c, d")]
    assert "columns parted by semicolons" in loaded.said[0]


@pytest.mark.parametrize("name", ["data.json", "data.json.gz"])
def test_a_list_of_records_may_have_notes_beside_it(tmp_path, name) -> None:
    document = {"version": "1", "licences": [{"name": "mit"}], "data": [{"prompt": "a", "response": "b"}] * 2}
    content = json.dumps(document).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    loaded = load(DataOptions(str(tmp_path / name)))
    assert [record.response for record in loaded.records] == ["b", "b"]
    assert "the list under 'data'" in loaded.said[0]
    one = {"prompt": "a", "response": "b", "data": [{"prompt": "c"}]}
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert [record.prompt for record in load_records(DataOptions(str(tmp_path / "one.json")))] == ["a"]


def test_answers_in_the_log_of_a_server_are_named_as_not_read() -> None:
    choices = [{"message": {"role": "assistant", "content": "ho"}}]
    loaded = load(DataOptions.of([{"messages": [{"role": "user", "content": "hi"}], "choices": choices}]))
    assert "not read: choices" in loaded.said[0]
