"""Traces of format 1: they still load, give the selections that they gave, and say what they lack."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from shape_moe.cli.main import run
from shape_moe.errors import UsageError
from shape_moe.scoring.registry import ScoreOptions, scorers
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.rules import rules
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.tracing.token_weights import PredictingWeights, SegmentWeights
from shape_moe.tracing.trace import Trace, load_trace, merge_traces
from support.data import synthetic_trace

RELEASED = Path(__file__).parent / "released"
OLD = RELEASED / "format-1"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return load_trace(OLD)


def assert_equal(found: dict, expected: dict) -> None:
    """Byte for byte; where sums of a Gram matrix's rows are added in another order, to the last bits of a share."""
    if expected["scorer"].startswith("contribution"):
        assert found.pop("mass_kept") == pytest.approx(expected.pop("mass_kept"), rel=1e-14)
        alphas = [0.0 if entry["alpha"] is None else entry.pop("alpha") for entry in (found, expected)]
        assert alphas[0] == pytest.approx(alphas[1], rel=1e-14)
    since = {name: found.pop(name) for name in list(found) if name not in expected}
    assert since.pop("gate_scale") == "survivors"
    assert (found.pop("format_version"), expected.pop("format_version")) == (2, 1)
    assert set(since.values()) <= {None}, "fields of later versions say nothing of a trace alone"
    shares = re.compile(r"[\d.]+ ?%")  # how they are written has changed
    texts = [[shares.sub("%", text) for text in entry.pop("warnings")] for entry in (found, expected)]
    assert texts[0] == texts[1]
    assert json.dumps(found) == json.dumps(expected)


def test_selections_are_those_that_the_release_wrote(trace, tmp_path) -> None:
    """From the old file, and from what becomes of it when it is written anew."""
    trace.save(tmp_path)
    anew = load_trace(tmp_path)
    found = json.loads((RELEASED / "format-1-selections.json").read_text())
    served = {name for name, s in scorers().items() if set(s.needs) <= {"coalitions", *trace.statistics}}
    assert set(scorers()) - served == {"replacement", "replacement-trained"}
    assert {(entry["scorer"], entry["rule"]) for entry in found} == {(s, r) for s in served for r in rules()}
    for expected in found:
        weights = SegmentWeights(expected["options"]["prompt"], expected["options"]["response"])
        method = Method(expected["scorer"], expected["rule"])
        options = SelectOptions(0.5, method, ScoreOptions(weights))
        for read in (trace, anew):
            assert_equal(select_from_trace(read, options).to_document(), dict(expected))


def test_numbers_are_those_in_the_file(trace) -> None:
    stored = load_file(OLD / "statistics.safetensors")
    for name in ("tokens", "gate", "norm", "layer_tokens"):
        np.testing.assert_array_equal(trace.statistics[name][:, 0, [0, 2]], stored[name])
        assert not trace.statistics[name][:, 0, [1, 3]].any()
    for name, gram in (("contribution", "gram"), ("contribution_relative", "gram_relative")):
        np.testing.assert_allclose(trace.sums(name), stored[gram].sum(axis=(1, 2, 4)), rtol=1e-12)
        for half in (0, 1):
            expected = stored[gram][:, :, half].sum(axis=(1, 3))
            np.testing.assert_allclose(trace.half(half).sums(name), expected, rtol=1e-12)
    table = pyarrow.parquet.read_table(OLD / "coalitions" / "layer-002.parquet")
    for place, column in enumerate(("prompt", "response", "prompt_half", "response_half")):
        np.testing.assert_array_equal(trace.coalitions[2].counts[:, place], table[column].to_numpy())
    assert not trace.coalitions[2].counts[:, 4:].any()


def test_it_says_what_it_lacks(trace, tmp_path, capsys) -> None:
    (remark,) = trace.remarks
    assert remark.startswith("The trace does not tell which tokens predict a response")
    with pytest.raises(UsageError, match="does not tell which tokens predict a response.*Trace the model anew"):
        trace.sums("gate", PredictingWeights())
    with pytest.raises(UsageError, match="needs replacement, which this trace, .* does not hold: trace the model anew"):
        score_trace(trace, "replacement")
    assert run(["select", str(OLD), "--keep", "0.5", "-o", str(tmp_path / "s.json")]) == 0
    assert remark in " ".join(capsys.readouterr().err.split())
    assert run(["score", str(OLD), "--json"]) == 0
    assert remark in " ".join(capsys.readouterr().err.split())


def test_it_merges_with_a_trace_of_today(trace) -> None:
    new = synthetic_trace(layers=2, experts=8, top_k=2)
    new = replace(new, info=replace(trace.info, cells=4, source={"data": "other.jsonl"}))
    new = replace(new, coalitions=dict(zip((0, 2), new.coalitions.values(), strict=True)))
    both = merge_traces([trace, new])
    assert both.info.cells == 2
    assert both.remarks == trace.remarks
    np.testing.assert_allclose(both.sums("gate"), trace.sums("gate") + new.sums("gate"), rtol=1e-12)
    np.testing.assert_allclose(
        score_trace(both, "contribution", ScoreOptions(pool_classes=True)).values,
        trace.sums("contribution_relative") + new.sums("contribution_relative"),
        rtol=1e-12,
    )
    assert sum(t.counts[:, :2].sum() for t in both.coalitions.values()) == sum(
        t.counts[:, :2].sum() for part in (trace, new) for t in part.coalitions.values()
    )
