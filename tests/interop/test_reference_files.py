"""The reference implementation's files: in, out, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import DataError
from shape_moe.interop.coalition_counts import coalitions_text, read_coalitions
from shape_moe.interop.selected_experts import read_selected, selected_text
from shape_moe.scoring.scores import read_scores, score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_scores, select_from_trace
from shape_moe.selection.selection import Selection, check_selection
from shape_moe.tracing.coalitions import CoalitionTable
from shape_moe.tracing.trace import Trace, TraceInfo
from support.data import make_examples, trace_model
from support.tiny_models import make_model


@pytest.fixture(scope="module")
def snapshot(checkpoint):
    """16 experts, 4 per token, MoE layers 0 and 2."""
    return open_snapshot(checkpoint("qwen3_moe"))


@pytest.fixture(scope="module")
def traced():
    return trace_model(make_model("qwen3_moe"), make_examples(16))


# --- selected experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.6, 0.8])
def test_published_selections_are_read_and_written_back(reference: Path, keep: float) -> None:
    file = reference / f"gsm8k_selected_experts_keep{keep}.json"
    selection = read_selected(file)
    check_selection(selection)
    assert (selection.num_experts, len(selection.layers), selection.fingerprint) == (128, 48, None)
    assert (selection.scorer, selection.rule, selection.routing) == ("shape", "coverage", "drop")
    assert selected_text(selection) == file.read_text()


def test_a_published_selection_is_ours_at_the_papers_tolerance(reference: Path) -> None:
    published = read_selected(reference / "gsm8k_selected_experts_keep0.6.json")
    ours = select_from_scores(
        read_scores(reference / "gsm8k_shapley_values.csv"), SelectOptions(keep=0.6, tolerance=0.01)
    )
    assert published.layers == ours.layers
    assert published.keep == ours.keep


selections = st.integers(2, 12).flatmap(
    lambda experts: st.builds(
        lambda layers, scorer, rule, keep, alpha: Selection(
            fingerprint=None,
            model=None,
            family=None,
            scorer=scorer,
            rule=rule,
            routing="drop",
            num_experts=experts,
            top_k=None,
            layers={layer: sorted(ids) for layer, ids in sorted(layers.items())},
            keep_asked=keep,
            alpha=alpha,
        ),
        st.dictionaries(st.integers(0, 60), st.sets(st.integers(0, experts - 1), min_size=1), min_size=1, max_size=5),
        st.sampled_from(["shape", "frequency", "reap"]),
        st.sampled_from(["coverage", "uniform", "global"]),
        st.floats(0.01, 1),
        st.none() | st.floats(0, 2),
    )
)


@given(selections)
@settings(max_examples=50, deadline=None)
def test_selections_survive_the_round_trip(tmp_path_factory, selection: Selection) -> None:
    file = tmp_path_factory.mktemp("selected") / "s.json"
    file.write_text(selected_text(selection))
    assert read_selected(file) == selection


def test_a_selection_is_bound_to_the_model_that_it_is_for(snapshot, tmp_path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"0": [3, 1], "2": [0]}))
    selection = read_selected(file, snapshot)
    assert selection.layers == {0: [1, 3], 2: [0]}
    assert (selection.fingerprint, selection.num_experts, selection.top_k) == (fingerprint(snapshot), 16, 4)
    assert selection.keep_asked == selection.keep
    with pytest.raises(DataError, match="name the model with --model"):
        read_selected(file)


def test_unknown_metadata_is_mentioned(tmp_path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"0": [0], "_metadata": {"total_experts": 4, "note": 1}}))
    assert read_selected(file).warnings == ("The file's metadata also had note, which a selection does not keep.",)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("nothing", "not a JSON file"),
        ([], "does not hold a JSON object"),
        ({}, "names no layer"),
        ({"_metadata": {}}, "names no layer"),
        ({"_metadata": [], "0": [1]}, "_metadata must be an object"),
        ({"00": [1]}, "'00' is not a layer"),
        ({"first": [1]}, "'first' is not a layer"),
        ({"0": 1}, "layer 0 must be a list"),
        ({"0": [True]}, "layer 0 must be a list"),
        ({"0": ["1"]}, "layer 0 must be a list"),
        ({"0": []}, "Layer 0 keeps no expert"),
        ({"0": [1, 1]}, "Layer 0 must keep different ids"),
        ({"0": [16]}, "between 0 and 15"),
        ({"0": [-1]}, "between 0 and 15"),
        ({"1": [1]}, "layer 1, which is not an MoE layer"),
        ({"0": [1], "_metadata": {"total_experts": 128}}, "promises total_experts 128, but there are 16"),
        ({"0": [1], "_metadata": {"selected_experts": 2}}, "promises selected_experts 2, but there are 1"),
        ({"0": [1], "_metadata": {"target_rate": "much"}}, "target_rate must be a number between 0 and 1"),
        ({"0": [1], "_metadata": {"alpha": 3}}, "alpha must be a number between 0 and 2"),
        ({"0": [1], "_metadata": {"method": 3}}, "method must be a name"),
    ],
)
def test_malformed_selections_are_refused(snapshot, tmp_path, document, message) -> None:
    file = tmp_path / "s.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(DataError, match=message):
        read_selected(file, snapshot)


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        read_selected(tmp_path / "s.json")


# --- values ---------------------------------------------------------------------------------------------------------


def test_published_values_are_read_and_written_back(reference: Path, tmp_path) -> None:
    file = reference / "gsm8k_shapley_values.csv"
    read_scores(file).table().write_csv(tmp_path / "values.csv")
    again, published = (pl.read_csv(f).sort("Layer", "Expert_ID") for f in (tmp_path / "values.csv", file))
    assert again.equals(published)


def test_values_of_a_trace_survive_the_round_trip(traced, tmp_path) -> None:
    scores = score_trace(traced, "shape")
    scores.table().write_csv(tmp_path / "values.csv")
    found = read_scores(tmp_path / "values.csv")
    assert found.layers == scores.layers
    np.testing.assert_array_equal(found.values, scores.values)
    np.testing.assert_array_equal(found.activations, scores.activations)


# --- coalition counts -----------------------------------------------------------------------------------------------


def test_coalitions_of_a_trace_survive_the_round_trip(traced, snapshot, tmp_path) -> None:
    """Segments and halves are not in the file; sets, counts, values and selection are."""
    file = tmp_path / "c.json"
    file.write_text(coalitions_text(traced))
    found = read_coalitions(file, snapshot)
    for layer, table in traced.coalitions.items():
        np.testing.assert_array_equal(found.coalitions[layer].members, table.members)
        np.testing.assert_array_equal(found.coalitions[layer].weighted(), table.weighted())
    assert found.info.fingerprint == fingerprint(snapshot)
    for scorer in ("shape", "frequency"):
        np.testing.assert_array_equal(score_trace(found, scorer).values, score_trace(traced, scorer).values)
    by_file = select_from_trace(found, SelectOptions(keep=0.5))
    assert by_file.layers == select_from_trace(traced, SelectOptions(keep=0.5)).layers
    assert by_file.stability is None
    assert coalitions_text(found) == file.read_text()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_counts_survive_the_round_trip(request, tmp_path_factory, data) -> None:
    snapshot = request.getfixturevalue("snapshot")
    members = st.lists(
        st.sets(st.integers(0, 15), min_size=4, max_size=4).map(lambda s: tuple(sorted(s))),
        min_size=3,
        max_size=3,
        unique=True,
    )
    counts = data.draw(st.lists(st.integers(1, 10**6) | st.floats(0.5, 1e6), min_size=3, max_size=3))
    tables = {}
    for layer in (0, 2):
        rows = sorted(data.draw(members))
        columns = np.zeros((3, 4), dtype=np.asarray(counts).dtype)
        columns[:, data.draw(st.integers(0, 1))] = counts
        tables[layer] = CoalitionTable(np.array(rows), columns)
    info = TraceInfo("f", "l", "m", "qwen3_moe", 16, snapshot.moe.routing, (0, 2), {}, 0)
    file = tmp_path_factory.mktemp("coalitions") / "c.json"
    file.write_text(coalitions_text(Trace(info, {}, tables)))
    found = read_coalitions(file, snapshot)
    for layer, table in tables.items():
        np.testing.assert_array_equal(found.coalitions[layer].members, table.members)
        np.testing.assert_array_equal(found.coalitions[layer].weighted(), table.weighted())


def test_sets_may_be_written_as_tuples_and_zero_counts_say_nothing(snapshot, tmp_path) -> None:
    file = tmp_path / "c.json"
    layer = {"(3, 2, 1, 0)": 2, "[0,1,2,3]": 1, "4,5,6,7": 4.0, "4,5,6,8": 0}
    file.write_text(json.dumps({"0": layer, "2": {"0, 1, 2, 3": 7}, "_metadata": {"model": "x"}}))
    found = read_coalitions(file, snapshot)
    assert found.coalitions[0].members.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.coalitions[0].counts[:, 1].tolist() == [3, 4]
    assert found.sums("tokens")[0, :9].tolist() == [3, 3, 3, 3, 4, 4, 4, 4, 0]
    assert found.info.tokens == {"prompt": 0.0, "response": 7.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2": None}, "has 1 layers, 0 to 0, but the model's MoE layers are 2, 0 to 2"),
        ({"1": {"0,1,2,3": 1}}, "has 3 layers"),
        ({"2": {}}, "layer 2 must be an object"),
        ({"2": [1]}, "layer 2 must be an object"),
        ({"2": {"0,1,2": 5}}, "'0,1,2' is not a set of 4 different experts between 0 and 15"),
        ({"2": {"0,1,2,2": 5}}, "'0,1,2,2' is not a set"),
        ({"2": {"0,1,2,16": 5}}, "'0,1,2,16' is not a set"),
        ({"2": {"0,1,2,-3": 5}}, "'0,1,2,-3' is not a set"),
        ({"2": {"0,1,2,3": -5}}, "must be a number of tokens, not -5"),
        ({"2": {"0,1,2,3": float("nan")}}, "must be a number of tokens"),
        ({"2": {"0,1,2,3": "5"}}, "must be a number of tokens"),
        ({"2": {"0,1,2,3": 4}}, "add up to 4 to 5; the file is not complete"),
        ({"0": {"0,1,2,3": 0}, "2": {"0,1,2,3": 0}}, "the file is not complete"),
    ],
)
def test_malformed_counts_are_refused(snapshot, tmp_path, change, message) -> None:
    document = {"0": {"0,1,2,3": 5}, "2": {"0,1,2,3": 5}, **change}
    file = tmp_path / "c.json"
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    with pytest.raises(DataError, match=message):
        read_coalitions(file, snapshot)


def test_what_the_format_has_no_place_for(traced) -> None:
    selection = select_from_trace(traced, SelectOptions(keep=0.5, method=Method(routing="reroute")))
    assert "reroute" not in selected_text(selection)
    assert selected_text(selection) == selected_text(replace(selection, stability=None, fingerprint=None))
