"""Documents of ours that were damaged, or made by somebody else: one sentence, never an accident later on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from shape_moe.errors import CheckpointError, ShapeMoeError
from shape_moe.job_record import read_job
from shape_moe.pruning.canary import load_canary
from shape_moe.selection.layer_curves import load_curves
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.selection.selection import Selection, load_selection
from shape_moe.serving.manifest import read_manifest
from shape_moe.tracing.trace import Trace, TraceInfo, load_trace
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


CANARY = {
    "format_version": 1,
    "dtype": "float32",
    "sequences": [{"tokens": [1, 2], "top_ids": [[1], [2]], "top_logprobs": [[-0.1], [-0.2]]}],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [0.5, 1]}, "Expected int, got float"),
        ({"tokens": ["1", 2]}, "Expected int, got str"),
        ({"tokens": [True, 2]}, "Expected int, got bool"),
        ({"tokens": [-1, 2]}, "do not fit each other"),
        ({"tokens": [1, 2, 3]}, "do not fit each other"),
        ({"tokens": [], "top_ids": [], "top_logprobs": []}, "do not fit each other"),
        ({"top_ids": [[1.5], [2]]}, "Expected int, got float"),
        ({"top_ids": [[1], [-2]]}, "do not fit each other"),
        ({"top_ids": [[1], []], "top_logprobs": [[-0.1], []]}, "do not fit each other"),
        ({"top_logprobs": [[-0.1], [-0.2, -0.3]]}, "do not fit each other"),
        ({"top_logprobs": [[-0.1], None]}, "Expected array, got null"),
    ],
)
def test_canaries_with_foreign_ids(tmp_path, change, words) -> None:
    file = tmp_path / "canary.json"
    file.write_text(json.dumps(CANARY))
    assert load_canary(file).sequences[0].tokens == [1, 2]
    file.write_text(json.dumps({**CANARY, "sequences": [{**CANARY["sequences"][0], **change}]}))
    with pytest.raises(CheckpointError, match=words):
        load_canary(file)


@pytest.mark.parametrize("change", [{"sequences": []}, {"format_version": 2}, {"sequences": [{"tokens": [1]}]}])
def test_canaries_that_are_none(tmp_path, change) -> None:
    (tmp_path / "canary.json").write_text(json.dumps({**CANARY, **change}))
    with pytest.raises(CheckpointError, match="is not a canary file"):
        load_canary(tmp_path / "canary.json")


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        (pl.col("e0").cast(pl.Float64) + 0.5, "column e0 holds no integers"),
        (pl.col("e0").cast(pl.Float64), "column e0 holds no integers"),
        (pl.col("e1").cast(pl.String), "column e1 holds no integers"),
        (pl.col("class").cast(pl.Float64), "column class holds no integers"),
        (pl.col("e0").shift(1), "column e0 has gaps"),
    ],
    ids=str,
)
def test_coalitions_of_foreign_ids(tmp_path, expression, words) -> None:
    synthetic_trace(seed=1).save(tmp_path)
    file = min((tmp_path / "coalitions").iterdir())
    pl.read_parquet(file).with_columns(expression).write_parquet(file)
    with pytest.raises(CheckpointError, match=words):
        load_trace(tmp_path)


def test_coalitions_in_any_order_are_the_same(tmp_path) -> None:
    """Also where one coalition stands in two rows, in two orders."""
    trace = synthetic_trace(seed=1)
    trace.save(tmp_path)
    file = min((tmp_path / "coalitions").iterdir())
    frame = pl.read_parquet(file)
    counts = [pl.col(name) for name in frame.columns if name not in ("e0", "e1", "class")]
    swapped = frame.with_columns(e0=frame["e1"], e1=frame["e0"])
    twice = pl.concat([frame.with_columns(c // 2 for c in counts), swapped.with_columns(c - c // 2 for c in counts)])
    twice.sample(fraction=1.0, shuffle=True, seed=0).write_parquet(file)
    found, expected = load_trace(tmp_path).coalitions[0], trace.coalitions[0]
    np.testing.assert_array_equal(found.members, expected.members)
    np.testing.assert_array_equal(found.counts, expected.counts)


def curves_for(info: TraceInfo, folder: Path, **changes: object) -> Path:
    """Curves by which experts of any trace could be chosen, with some of their entries changed."""
    layers = len(info.layers)
    document = {
        "format_version": 1,
        "fingerprint": info.fingerprint,
        "model": "m",
        "scorer": "shape",
        "options": {"prompt": 1.0, "response": 1.0, "seed": 0},
        "routing": "drop",
        "num_experts": info.num_experts,
        "layers": list(info.layers),
        "counts": [1, 2, 4],
        "classes": [""],
        "tokens": [[5.0, 5.0]],
        "sums": [[[[3.0, 3.0]], [[2.0, 2.0]], [[1.0, 1.0]]]] * layers,
    }
    (folder / "curves.json").write_text(json.dumps({**document, **changes}))
    return folder / "curves.json"


def select_by(file: Path, trace: Trace) -> Selection:
    asked = SelectOptions(0.5, Method("shape", "measured"), curves=load_curves(file))
    return TraceSelector(trace).select(asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": [0.5, 1, 2]}, "Expected int, got float"),
        ({"layers": ["0", 1, 2]}, "Expected int, got str"),
        ({"layers": [2, 1, 0]}, "must ascend"),
        ({"layers": [0, 0, 0]}, "must ascend"),
        ({"layers": [7, 8, 9]}, "other numbers than the trace"),
        ({"num_experts": 7}, "3 layers of 7 experts"),
        ({"num_experts": 10}, "3 layers of 10 experts"),
        ({"counts": [1, 2.5, 4]}, "Expected int, got float"),
        ({"counts": [1, 2, True]}, "Expected int, got bool"),
        ({"tokens": [[-5.0, 50.0]]}, "negative numbers of tokens"),
    ],
)
def test_layer_curves_of_foreign_ids(tmp_path, change, words) -> None:
    trace = synthetic_trace(seed=1)
    assert select_by(curves_for(trace.info, tmp_path), trace).kept == 12
    with pytest.raises(ShapeMoeError, match=words):
        select_by(curves_for(trace.info, tmp_path, **change), trace)
