"""Data as people have it, through ``shape-moe trace``: right, or refused by one sentence that names the way out."""

from __future__ import annotations

import gzip
import json

import datasets
import polars as pl
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.tracing.trace import load_trace
from support.cli import refused

TEMPLATE = (
    "{% for t in tools or [] %}+{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments | tojson }}){% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"k": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TRAJECTORY = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "2"},
    {"role": "assistant", "content": "yo"},
]
SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"k": 1}}'},
    {"from": "observation", "value": "2"},
    {"from": "gpt", "value": "yo"},
]
SIMPLE = ("u:hi;a:yo;", ["yo;"])
CALLED = ('+f s:be brief;u:hi;a:(f {"k": 1});t:2;a:yo;', ['(f {"k": 1});', "yo;"])
SHAPES = {
    "messages": ({"messages": TALK}, SIMPLE, "chat messages."),
    "messages as JSON text": ({"messages": json.dumps(TALK)}, SIMPLE, "as JSON text"),
    "tools": ({"messages": TRAJECTORY, "tools": [TOOL]}, CALLED, "chat messages (with tools)"),
    "tools as JSON text": ({"messages": TRAJECTORY, "tools": json.dumps([TOOL["function"]])}, CALLED, "(with tools)"),
    "no content": (
        {"messages": [TALK[0], {"role": "assistant", "tool_calls": [CALL]}]},
        ('u:hi;a:(f {"k": 1});', ['(f {"k": 1});']),
        "chat messages.",
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                TALK[1],
            ]
        },
        ("u:h\ni;a:yo;", ["yo;"]),
        "chat messages.",
    ),
    "reasoning": (
        {"messages": [TALK[0], {**TALK[1], "reasoning_content": "hm"}]},
        ("u:hi;a:hmyo;", ["hmyo;"]),
        "chat messages.",
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "d"}, *TALK]},
        ("s:d;u:hi;a:yo;", ["yo;"]),
        "no developer role",
    ),
    "ShareGPT": (
        {"conversations": SHAREGPT, "system": "be brief", "tools": json.dumps([TOOL])},
        CALLED,
        "ShareGPT records: conversations -> messages",
    ),
    "Alpaca": (
        {"instruction": "h", "input": "i", "output": "yo"},
        ("u:h\n\ni;a:yo;", ["yo;"]),
        "Alpaca records: instruction + input -> prompt, output -> response",
    ),
    "Alpaca with text": (
        {"instruction": "hi", "input": "", "output": "yo", "text": "hi yo"},
        SIMPLE,
        "not read: text",
    ),
    "prompt and completion": ({"prompt": "hi", "completion": "yo"}, SIMPLE, "prompt/completion records"),
    "conversational": ({"prompt": TALK[:1], "completion": TALK[1:]}, SIMPLE, "conversational prompts and completions"),
    "preference": ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, SIMPLE, "rejected is left out"),
    "conversational preference": ({"chosen": TALK, "rejected": TALK}, SIMPLE, "preference pairs"),
    "function calls": (
        {"query": "hi", "answers": '[{"name": "f", "arguments": {"k": 1}}]', "tools": json.dumps([TOOL["function"]])},
        ('+f u:hi;a:(f {"k": 1});', ['(f {"k": 1});']),
        "answers -> tool calls",
    ),
    "prompt and reasoning": (
        {"prompt": "hi", "response": "yo", "reasoning": "hm"},
        ("u:hi;a:hmyo;", ["hmyo;"]),
        "prompt/response records -> messages",
    ),
    "text": ({"text": "hi yo"}, ("hi yo", []), "plain text"),
}


@pytest.fixture
def traced(call, embedded, tmp_path, monkeypatch):
    """Trace a source with the template above: text and responses of the first example, and what was said."""
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    made, run = [], ExampleMaker.run
    monkeypatch.setattr(ExampleMaker, "run", lambda *given: made.append(run(*given)) or made[-1])

    def trace(*arguments) -> tuple[str, int, str]:
        out = tmp_path / "trace"
        given = (embedded, *arguments, "--chat-template", template, "--max-new-tokens", 0)
        code, stdout, said = call("trace", *given, "-o", out, "--force", "--device", "cpu", "--json")
        assert code == 0, said
        info = load_trace(out).info
        assert json.loads(stdout)["examples"] == info.examples
        text = AutoTokenizer.from_pretrained(embedded).decode(made[-1][0].tokens)
        return text, int(info.tokens["response"]), " ".join(said.split())

    return trace


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(traced, tmp_path, shape) -> None:
    row, (text, responses), words = SHAPES[shape]
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found, tokens, said = traced("--data", file)
    assert found == text
    assert tokens == sum(map(len, responses))
    assert words in said
    assert "1 of 128 asked" in said


FILES = {
    "d.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "d.jsonl.zst": lambda path, rows: write_zst(path, lines(rows)),
    "lines.json": lambda path, rows: path.write_bytes(lines(rows)),
    "list.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "nested.json": lambda path, rows: path.write_text(json.dumps({"data": rows})),
    "d.parquet": lambda path, rows: pl.DataFrame(rows).write_parquet(path),
    "d[1]*.parquet": lambda path, rows: pl.DataFrame(rows).write_parquet(path),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "clone[ed]": lambda path, rows: clone(path, rows),  # noqa: PLW0108 -- it is defined below
}


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_zst(path, data: bytes) -> None:
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)


def clone(path, rows) -> None:
    """A data set as a clone of a hub repository holds it."""
    (path / "data").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: mit\n---\nA data set.\n")
    for part in (0, 1):
        pl.DataFrame(rows[part::2]).write_parquet(path / "data" / f"train-0000{part}-of-00002.parquet")
    pl.DataFrame(rows[:1]).write_parquet(path / "data" / "test-00000-of-00001.parquet")


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(traced, tmp_path, name) -> None:
    rows = [{"messages": TALK}, {"messages": [*TALK, *TALK]}]
    FILES[name](tmp_path / name, rows)
    found, tokens, said = traced("--data", tmp_path / name)
    assert (found, tokens) == (SIMPLE[0], 9)
    assert "2 of 128 asked" in said


def test_text_files_hold_a_text_a_line(traced, tmp_path) -> None:
    (tmp_path / "d.txt").write_text("one\n\ntwo\n")
    found, tokens, said = traced("--data", tmp_path / "d.txt")
    assert (found, tokens) == ("one", 0)
    assert "one text a line" in said


def test_several_sources_are_classes(call, embedded, traced, tmp_path) -> None:
    for name, count in (("maths", 12), ("code", 4)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": f"{name} {i}"} for i in range(count)]))
    sources = ("--data", tmp_path / "maths.jsonl", "--data", tmp_path / "code.jsonl")
    _, _, said = traced(*sources, "--samples", 6)
    assert "maths.jsonl: 3 of 12 records; plain text." in said
    assert "code.jsonl: 3 of 4 records; plain text." in said
    _, _, said = traced(*sources, "--weight", 2, "--weight", 1, "--samples", 9)
    assert "maths.jsonl: 6 of 12 records" in said
    assert "code.jsonl: 3 of 4 records" in said
    info = load_trace(tmp_path / "trace").info
    assert info.source["classes"] == ["maths", "code"]
    assert info.source["weights"] == [2, 1]
    result = call("trace", embedded, *sources, "--weight", 2, "-o", tmp_path / "t")
    refused(result, 2, "2 sources need as many weights")


REFUSED = {
    "two shapes": ({"prompt": "a", "text": "b"}, "--format prompt or --format text"),
    "question": ({"question": "a", "answer": "b"}, "--map prompt=question --map response=answer"),
    "pictures": ({"messages": TALK, "images": ["a.png"]}, "only text can be traced"),
    "picture parts": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "a part of type 'image_url'; only text is read",
    ),
    "bad answer": ({"prompt": "a", "completion": "b", "label": False}, "marked as a bad one"),
    "transcripts": ({"chosen": "Human: a", "rejected": "b"}, "--map text=chosen"),
    "foreign role": ({"messages": [{"role": "critic", "content": "a"}]}, "'critic' is none"),
    "broken call": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "needs the name of a function",
    ),
    "broken JSON text": ({"messages": "[{"}, "messages as JSON text: not valid JSON"),
    "deep": ({"messages": TALK, "tools": [json.loads('{"a":' * 200 + "1" + "}" * 200)]}, "levels deep"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_way_out(call, embedded, tmp_path, kind) -> None:
    row, words = REFUSED[kind]
    (tmp_path / "d.jsonl").write_bytes(lines([{"text": "fine"}, row]))
    result = call("trace", embedded, "--data", tmp_path / "d.jsonl", "-o", tmp_path / "t")
    refused(result, 1, "d.jsonl, line 2", words, "--skip-bad")


def test_lone_surrogates(call, embedded, tmp_path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\\ud83d"}\n')
    result = call("trace", embedded, "--data", tmp_path / "d.jsonl", "-o", tmp_path / "t")
    refused(result, 1, "d.jsonl, line 2:", "half of a surrogate pair")
    code, _, said = call("trace", embedded, "--data", tmp_path / "d.jsonl", "-o", tmp_path / "t", "--skip-bad")
    assert code == 0
    assert "1 bad record skipped; the first:" in " ".join(said.split())
    assert list(load_trace(tmp_path / "t").info.source["skipped"]) == [f"{tmp_path / 'd.jsonl'}, line 2"]


def test_one_bad_row_in_a_large_file(call, embedded, tmp_path, monkeypatch) -> None:
    """Rows that are not drawn are not parsed; a bad one that is drawn gives way to another with --skip-bad."""
    from shape_moe.calibration import files

    parsed = []
    monkeypatch.setattr(
        files, "parse_json", lambda data, where, real=files.parse_json: parsed.append(where) or real(data, where)
    )
    (tmp_path / "d.jsonl").write_bytes(b"{broken\n" + b'{"text": "some words"}\n' * 200_000)
    arguments = ("trace", embedded, "--data", tmp_path / "d.jsonl", "-o", tmp_path / "t", "--samples", 25, "--skip-bad")
    code, _, said = call(*arguments)
    assert code == 0
    assert len(parsed) == 25
    assert "25 of 200,001 records" in " ".join(said.split())


def test_what_is_found_before_weights_are_loaded(call, embedded, tmp_path, monkeypatch) -> None:
    from shape_moe.jobs import session

    monkeypatch.setattr(session, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    file, out = tmp_path / "d.jsonl", tmp_path / "t"
    file.write_bytes(lines([{"prompt": "a" * 30, "response": "b" * 10}] * 3))
    refused(
        call("trace", embedded, "--data", file, "-o", out, "--max-length", 20),
        1,
        "20 tokens leave no response: each of the 3 prompts",
        "--max-length",
    )
    refused(call("trace", embedded, "--data", file, "-o", out, "--chat-template", tmp_path / "no.jinja"), 1, "no.jinja")
    refused(call("trace", embedded, "--data", file, "-o", out, "--format", "chat"), 2, "no format 'chat'; use messages")
    refused(call("trace", embedded, "--data", file, "-o", out, "--turns", "first"), 2, "turns must be all or last")
    refused(call("trace", embedded, "--data", file, "-o", out, "--format", "messages"), 1, "needs the field messages")


def test_responses_that_are_cut_are_counted(traced, tmp_path) -> None:
    rows = [
        {"prompt": "a" * 30, "response": "b"},
        {"prompt": "a", "response": "b" * 30},
        {"prompt": "a", "response": "b"},
    ]
    (tmp_path / "d.jsonl").write_bytes(lines(rows))
    _, tokens, said = traced("--data", tmp_path / "d.jsonl", "--max-length", 20)
    assert "2 of 3 examples are cut to 20 tokens; 1 of them lose their whole response." in said
    assert tokens == 20 - len("u:a;a:") + len("b;")
