"""Documents of ours that were damaged, or made by somebody else: one sentence, never an accident later on."""

from __future__ import annotations

import json

import pytest

from shape_moe.errors import CheckpointError
from shape_moe.job_record import read_job
from shape_moe.selection.selection import load_selection
from shape_moe.serving.manifest import read_manifest
from shape_moe.tracing.trace import load_trace
from support.data import synthetic_trace

HOSTILE = [
    b"",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"[1]",
    b"null",
    b'{"format_version": 1, "num_experts": ' + b"9" * 5_000 + b"}",
    b'{"format_version": 1, "layers": "\xff"}',
    b'{"format_version": 1, "layers": "\\u0000"}',
    b'{"format_version": Infinity}',
    b'{"format_version": [1]}',
    b'{"format_version": 1}',
    b'{"format_version": true}',
    b"\xef\xbb\xbf{}",
]
READERS = [
    ("selection.json", lambda folder: load_selection(folder / "selection.json")),
    ("trace.json", load_trace),
    ("shape/manifest.json", read_manifest),
]


@pytest.mark.parametrize("content", HOSTILE, ids=[str(content[:24]) for content in HOSTILE])
@pytest.mark.parametrize(("name", "read"), READERS, ids=[name for name, _ in READERS])
def test_hostile_documents(tmp_path, name, read, content) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
    (tmp_path / "job.json").write_bytes(content)
    assert read_job(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"routing": {"top_k": 2_000_000_000, "floor": 1}}, "2000000000 of 8 experts cannot serve a token"),
        ({"routing": {"top_k": "2", "floor": 1}}, "Expected int, got str"),
        ({"routing": [2]}, "Expected object, got array"),
        ({"num_experts": 2_000_000_000}, "of 2000000000 experts"),
        ({"num_experts": [8]}, "Expected int, got array"),
        ({"num_experts": 1}, "of 1 experts"),
        ({"layers": [2, 1, 0]}, "different and ascending"),
        ({"layers": [0, 1, 1]}, "different and ascending"),
        ({"layers": []}, "different and ascending"),
        ({"layers": [-1, 0, 1]}, "different and ascending"),
        ({"layers": [0.5]}, "Expected int, got float"),
        ({"tokens": {"prompt": "many"}}, r"Expected int \| float, got str"),
        ({"examples": 1.5}, "Expected int, got float"),
        ({"statistics": [1]}, "Expected object, got array"),
        ({"statistics": {"gate": {"axes": "row", "reduction": "sum"}}}, "Invalid enum value .row."),
        ({"surprise": 1}, "unknown entry 'surprise'"),
        ({"canary": [["a"]]}, "Expected int, got str"),
        ({"tokens": {"prompt": float("nan")}}, "not a finite number"),
    ],
)
def test_damaged_traces(tmp_path, change, words) -> None:
    synthetic_trace().save(tmp_path)
    document = json.loads((tmp_path / "trace.json").read_text())
    (tmp_path / "trace.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(CheckpointError, match=words):
        load_trace(tmp_path)


def test_coalitions_name_experts_that_there_are(tmp_path) -> None:
    synthetic_trace().save(tmp_path)
    document = json.loads((tmp_path / "trace.json").read_text())
    (tmp_path / "trace.json").write_text(json.dumps({**document, "num_experts": 4}))
    with pytest.raises(CheckpointError, match="names experts that the model does not have"):
        load_trace(tmp_path)
