"""Data that a trace takes from Python, and what it finds out before weights are loaded."""

from __future__ import annotations

import shutil

import datasets
import pytest
from transformers import AutoTokenizer

from shape_moe.architectures import loading
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import CheckpointError, DataError, UsageError
from shape_moe.jobs import session
from shape_moe.jobs.planning import held_out_tracing
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from support import chat_templates
from support.data import write_lines

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(6)]


def test_lists_and_datasets_are_data(embedded, tmp_path) -> None:
    """The same records, whoever holds them: the traces are the same."""
    file = trace(embedded, str(write_lines(tmp_path / "d.jsonl", ROWS)))
    split = datasets.Dataset.from_list(ROWS)
    for data in (ROWS, split, datasets.DatasetDict({"train": split})):
        found = trace(embedded, data, tmp_path / "t", force=True)
        assert found.info.source["content_hash"] == file.info.source["content_hash"]
        assert found.info.tokens == file.info.tokens
        assert found.info.source["data"] == "records in memory"
    with pytest.raises(UsageError, match="made from records in memory: give examples to judge by"):
        held_out_tracing(None, found, None)
    both = DataOptions.of(ROWS[:2], also=(ROWS[2:],), samples=4)
    assert both.classes == ("records in memory 1", "records in memory 2")
    assert trace(embedded, both).info.examples == 4


def test_what_is_no_data(embedded) -> None:
    with pytest.raises(DataError, match=r"records in memory, row 2: a record must be a mapping, not int"):
        trace(embedded, [ROWS[0], 3])
    with pytest.raises(DataError, match=r"of a streamed data set take some first, as datasets.Dataset.from_list"):
        trace(embedded, datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(DataError, match=r"has no split 'train'; it has test"):
        trace(embedded, datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}))
    with pytest.raises(DataError, match="holds no records"):
        trace(embedded, [])


def test_holes_of_arrow_are_no_fields(embedded) -> None:
    """Arrow gives every row the fields of all rows, with nulls; arguments and parameters lose them again."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": "x"}}}
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [entry]}]}
        for entry in (call, other)
    ]
    tokens = TokenOptions(chat_template=chat_templates.QWEN3)
    data = (DataOptions.of(rows), DataOptions.of(datasets.Dataset.from_list(rows)))
    first, second = (trace(embedded, ExampleOptions(options, tokens)) for options in data)
    assert first.info.source["content_hash"] == second.info.source["content_hash"]
    assert first.info.tokens == second.info.tokens


@pytest.fixture
def model(embedded, tmp_path, monkeypatch):
    """A copy of the embedded model whose weights must not be loaded."""
    monkeypatch.setattr(session, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    return shutil.copytree(embedded, tmp_path / "model")


def test_tokens_beyond_the_embedding(model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    with pytest.raises(
        DataError, match=r"row 2: token id 258 \('<tool>'\) is beyond the model's embedding of 258 rows"
    ):
        trace(model, [ROWS[0], {"text": "a <tool>"}])


def test_conversations_without_a_template(model, tmp_path) -> None:
    (model / "chat_template.jinja").unlink()
    talk = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]
    with pytest.raises(DataError, match=r"need a chat template, but the tokenizer has none; .* --chat-template FILE"):
        trace(model, talk)


def test_tokenizers_that_take_sentencepiece(model, monkeypatch) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    (model / "tokenizer.model").write_bytes(b"\n")
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="tokenizer.model alone.*pip install sentencepiece protobuf"):
        trace(model, ROWS)
