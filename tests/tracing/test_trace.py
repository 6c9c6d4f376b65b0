"""The trace artifact: round trip, merging, halves, damage."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shape_moe
from shape_moe.errors import CheckpointError, FingerprintError, UsageError
from shape_moe.scoring.scores import score_trace
from shape_moe.tracing.coalitions import COUNT_COLUMNS, tabulate
from shape_moe.tracing.statistics import statistics as all_statistics
from shape_moe.tracing.token_weights import SegmentWeights
from shape_moe.tracing.trace import load_trace, merge_traces
from support.data import make_examples, synthetic_trace, trace_model
from support.tiny_models import make_model


def assert_same(first, second) -> None:
    assert set(first.statistics) == set(second.statistics)
    for name in first.statistics:
        np.testing.assert_array_equal(first.statistics[name], second.statistics[name])
        assert first.statistics[name].dtype == second.statistics[name].dtype
    for layer, table in first.coalitions.items():
        np.testing.assert_array_equal(table.members, second.coalitions[layer].members)
        np.testing.assert_array_equal(table.counts, second.coalitions[layer].counts)


def test_round_trip(tmp_path) -> None:
    trace = synthetic_trace()
    trace.save(tmp_path / "t")
    loaded = shape_moe.load_trace(tmp_path / "t")
    assert loaded.info == trace.info
    assert_same(trace, loaded)


def test_files_are_open_to_other_tools(tmp_path) -> None:
    synthetic_trace(top_k=3).save(tmp_path)
    document = json.loads((tmp_path / "trace.json").read_text())
    assert document["format_version"] == 2
    assert document["axes"] == {
        "layer": ["layer", "class", "cell", "fold"],
        "expert": ["layer", "class", "cell", "fold", "expert"],
        "pair": ["layer", "class", "cell", "half", "expert", "expert"],
    }
    assert document["statistics"]["largest_norm"] == {"axes": "expert", "reduction": "max"}
    table = pyarrow.parquet.read_table(tmp_path / "coalitions" / "layer-000.parquet")
    assert table.column_names == ["e0", "e1", "e2", "class", *COUNT_COLUMNS]
    rows = np.stack([table[name].to_numpy() for name in ("e0", "e1", "e2")], axis=1)
    assert (np.diff(rows, axis=1) > 0).all()
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_traces_of_parts_merge_to_the_trace_of_the_whole() -> None:
    model = make_model("qwen3_moe")
    examples = make_examples(16, seed=5)
    whole = trace_model(model, examples, batch_size=8)
    parts = [trace_model(model, examples[:8], batch_size=8), trace_model(model, examples[8:], batch_size=8)]
    merged = merge_traces(parts)
    for layer, table in whole.coalitions.items():
        np.testing.assert_array_equal(table.members, merged.coalitions[layer].members)
        np.testing.assert_array_equal(table.counts, merged.coalitions[layer].counts)
    for name, values in whole.statistics.items():
        size = 1e-6 * np.abs(values).max()  # terms have both signs
        np.testing.assert_allclose(values, merged.statistics[name], rtol=1e-4, atol=size, err_msg=name)
    assert merged.info.examples == 16


@given(st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_merge_order_does_not_matter(order) -> None:
    traces = [synthetic_trace(seed=seed, tokens=50) for seed in range(3)]
    values = [score_trace(merge_traces([traces[i] for i in o]), "shape").values for o in (order, range(3))]
    assert np.array_equal(*values)


def test_weights_multiply_sums_and_leave_maxima() -> None:
    first, second = synthetic_trace(seed=0), synthetic_trace(seed=1)
    merged = merge_traces([first, second], [0.5, 2.0])
    np.testing.assert_allclose(
        merged.statistics["gate"], 0.5 * first.statistics["gate"] + 2 * second.statistics["gate"]
    )
    np.testing.assert_array_equal(
        merged.statistics["largest_norm"],
        np.maximum(first.statistics["largest_norm"], second.statistics["largest_norm"]),
    )
    assert sum(t.counts[:, 0].sum() for t in merged.coalitions.values()) == pytest.approx(
        sum(
            0.5 * a.counts[:, 0].sum() + 2 * b.counts[:, 0].sum()
            for a, b in zip(first.coalitions.values(), second.coalitions.values(), strict=True)
        )
    )


def test_traces_of_different_models_do_not_merge() -> None:
    from dataclasses import replace

    first = synthetic_trace()
    other = replace(first, info=replace(first.info, fingerprint="sha256:" + "c" * 64))
    with pytest.raises(FingerprintError, match="different models"):
        merge_traces([first, other])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_must_fit(weights) -> None:
    with pytest.raises(UsageError, match="weights"):
        merge_traces([synthetic_trace(), synthetic_trace(seed=1)], weights)
    with pytest.raises(UsageError, match="nothing to merge"):
        merge_traces([])


def test_halves_add_up_to_the_whole() -> None:
    model = make_model("olmoe")
    examples = make_examples(16, seed=2)
    trace = trace_model(model, examples)
    halves = [trace.half(0), trace.half(1)]
    for name, spec in all_statistics().items():
        parts = [half.sums(name) for half in halves]
        whole = trace.sums(name)
        together = np.maximum(*parts) if spec.reduction == "max" else parts[0] + parts[1]
        np.testing.assert_allclose(together, whole, rtol=1e-12, err_msg=name)
    alone = trace_model(model, [e for i, e in enumerate(examples) if i % 2 == 0])
    for layer, table in alone.coalitions.items():
        np.testing.assert_array_equal(table.members, halves[0].coalitions[layer].members)
        np.testing.assert_array_equal(table.counts[:, :2], halves[0].coalitions[layer].counts[:, :2])
    of_all = [name for name in COUNT_COLUMNS if not name.endswith("_half")]
    whole, first = ([COUNT_COLUMNS.index(name + half) for name in of_all] for half in ("", "_half"))
    for layer in trace.coalitions:
        even, odd = (half.coalitions[layer].counts for half in halves)
        np.testing.assert_array_equal(even[:, first], even[:, whole])
        np.testing.assert_array_equal(odd[:, first], np.zeros_like(odd[:, whole]))


def test_segment_weights_select_segments() -> None:
    trace = synthetic_trace()
    only = SegmentWeights(prompt=0, response=1)
    gate, norm = (trace.statistics[name][:, 0, 2:] for name in ("gate", "largest_norm"))
    np.testing.assert_allclose(trace.sums("gate", only), gate.sum(axis=(1, 2)))
    np.testing.assert_allclose(trace.sums("largest_norm", only), norm.max(axis=(1, 2)))
    with pytest.raises(UsageError, match="must not be negative"):
        SegmentWeights(prompt=-1)
    with pytest.raises(UsageError, match="must be positive"):
        SegmentWeights(0, 0)


def test_damage_is_reported(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"no trace\.json"):
        load_trace(tmp_path)
    synthetic_trace().save(tmp_path)
    (tmp_path / "coalitions" / "layer-001.parquet").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="layer-001"):
        load_trace(tmp_path)
    synthetic_trace().save(tmp_path)
    (tmp_path / "statistics.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(CheckpointError, match=r"statistics\.safetensors"):
        load_trace(tmp_path).sums("gate")
    document = json.loads((tmp_path / "trace.json").read_text())
    (tmp_path / "trace.json").write_text(json.dumps({**document, "format_version": 99}))
    with pytest.raises(CheckpointError, match="another format version"):
        load_trace(tmp_path)


def test_missing_statistics_are_named() -> None:
    from dataclasses import replace

    trace = synthetic_trace()
    bare = replace(trace, statistics={"tokens": trace.statistics["tokens"]}, info=replace(trace.info, engine="vllm"))
    with pytest.raises(UsageError, match="needs contribution_relative.*vllm.*Transformers"):
        score_trace(bare, "contribution")
    assert score_trace(bare, "shape").values.shape == (3, 8)


def test_tabulate_counts_every_token_once() -> None:
    rng = np.random.default_rng(0)
    members = np.array([rng.choice(5, 2, replace=False) for _ in range(300)])
    segments, folds = rng.integers(0, 2, 300), rng.integers(0, 8, 300)
    predicting, classes = rng.integers(0, 2, 300), rng.integers(0, 3, 300)
    table = tabulate(members, segments, folds, predicting, classes)
    assert table.counts[:, :2].sum() == 300
    assert table.counts[:, 2:4].sum() == (folds % 2 == 0).sum()
    assert table.counts[:, 4:6].sum() == predicting.sum()
    assert table.counts[:, 6:].sum() == (predicting * (folds % 2 == 0)).sum()
    cells = 2 * segments + predicting
    assert table.by_cell().sum(axis=0).tolist() == np.bincount(cells, minlength=4).tolist()
    for number in range(3):
        alone = classes == number
        only = tabulate(members[alone], segments[alone], folds[alone], predicting[alone])
        np.testing.assert_array_equal(table.of_class(number).members, only.members)
        np.testing.assert_array_equal(table.of_class(number).counts, only.counts)
    together = tabulate(members, segments, folds, predicting)
    np.testing.assert_array_equal(table.pooled().members, together.members)
    np.testing.assert_array_equal(table.pooled().counts, together.counts)
    np.testing.assert_array_equal(table.weighted(), table.counts[:, 0] + table.counts[:, 1])
    np.testing.assert_allclose(
        table.weighted(SegmentWeights(0.5, 2)), 0.5 * table.counts[:, 0] + 2 * table.counts[:, 1]
    )
