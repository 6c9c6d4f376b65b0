"""``shape-moe convert`` as a user types it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import shape_moe
from support.cli import refused
from support.data import write_lines
from support.served import random_ids, sglang_response, vllm_response


@pytest.fixture
def served(tmp_path):
    """Traffic of the embedded model (4 layers, 32 experts, 4 per token), whatever was said."""
    rng = np.random.default_rng(0)
    rows = [vllm_response(random_ids(rng, int(rng.integers(5, 30)), 4, 32, 4), prompt=4) for _ in range(24)]
    return write_lines(tmp_path / "responses.jsonl", rows)


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_traffic_to_a_selection(call, embedded, served, tmp_path) -> None:
    code, out, err = call("convert", served, "--model", embedded, "-o", tmp_path / "t")
    assert code == 0
    assert "24 examples" in out
    assert "Reading responses" in err
    code, out, _ = call("select", tmp_path / "t", "--keep", "0.5", "-o", tmp_path / "s.json", "--json")
    assert code == 0
    assert sum(len(ids) for ids in json.loads(out)["layers"].values()) == 64
    refused(call("select", tmp_path / "t", "--keep", "0.5", "--scorer", "reap"), 2, "made by vllm does not hold")
    code, out, err = call("prune", embedded, "--selection", tmp_path / "s.json", "-o", tmp_path / "out", "--no-logits")
    assert code == 0, err
    assert files(tmp_path) == {"responses.jsonl", "t", "s.json", "out"}


def test_traffic_as_json_and_through_merge(call, embedded, served, tmp_path) -> None:
    code, out, err = call("convert", served, "--model", embedded, "-o", tmp_path / "a", "--json", "-q")
    assert code == 0
    assert err == ""
    assert json.loads(out)["examples"] == 24
    ids = random_ids(np.random.default_rng(1), 9, 4, 32, 4)
    other = write_lines(tmp_path / "sglang.jsonl", [sglang_response(ids, 4)] * 8)
    assert call("convert", other, "--model", embedded, "-o", tmp_path / "b", "-q")[0] == 0
    code, out, _ = call("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "both", "--json")
    assert code == 0
    assert json.loads(out)["examples"] == 32


def test_bad_responses_stop_or_are_counted(call, embedded, served, tmp_path) -> None:
    with served.open("a") as stream:
        stream.write('{"choices": [{}]}\n')
    job = ("convert", served, "--model", embedded, "-o", tmp_path / "t")
    refused(call(*job), 1, "responses.jsonl, line 25", "--enable-return-routed-experts")
    assert files(tmp_path) == {"responses.jsonl"}
    code, out, err = call(*job, "--skip-bad", "--json")
    assert code == 0
    assert "1 responses were skipped" in err
    assert list(json.loads(out)["skipped"]) == [f"{served}, line 25"]


def test_coalition_counts_there_and_back(call, embedded, served, tmp_path) -> None:
    assert call("convert", served, "--model", embedded, "-o", tmp_path / "t", "-q")[0] == 0
    assert call("convert", tmp_path / "t", "--to", "reference", "-o", tmp_path / "c.json")[0] == 0
    code, out, _ = call("convert", tmp_path / "c.json", "--model", embedded, "-o", tmp_path / "u", "--json")
    assert code == 0
    first, again = (shape_moe.load_trace(tmp_path / name) for name in ("t", "u"))
    np.testing.assert_array_equal(shape_moe.score(first).values, shape_moe.score(again).values)
    assert json.loads(out)["fingerprint"] == first.info.fingerprint


def test_selections_there_and_back(call, embedded, served, tmp_path) -> None:
    assert call("convert", served, "--model", embedded, "-o", tmp_path / "t", "-q")[0] == 0
    call("select", tmp_path / "t", "--keep", "0.6", "-o", tmp_path / "s.json", "-q")
    code, _, err = call("convert", tmp_path / "s.json", "--to", "reference", "-o", tmp_path / "r.json")
    assert code == 0
    assert f"Wrote {tmp_path / 'r.json'}" in err
    code, out, _ = call("convert", tmp_path / "r.json", "--model", embedded, "-o", tmp_path / "again.json")
    assert code == 0
    assert "Keeps 77 of 128 experts" in out
    ours, again = (shape_moe.load_selection(tmp_path / name) for name in ("s.json", "again.json"))
    assert again.layers == ours.layers
    assert (again.fingerprint, again.alpha, again.scorer, again.rule) == (
        ours.fingerprint,
        ours.alpha,
        ours.scorer,
        ours.rule,
    )
    call("convert", tmp_path / "again.json", "-o", tmp_path / "second.json")
    assert (tmp_path / "second.json").read_text() == (tmp_path / "r.json").read_text()


def test_published_selections_convert(call, reference, tmp_path) -> None:
    published = reference / "gsm8k_selected_experts_keep0.6.json"
    code, out, _ = call("convert", published, "-o", tmp_path / "s.json", "--json")
    assert code == 0
    assert json.loads(out)["keep_met"] == 3673 / 6144
    assert call("convert", tmp_path / "s.json", "-o", tmp_path / "back.json")[0] == 0
    assert (tmp_path / "back.json").read_text() == published.read_text()


def test_the_kind_is_told_by_content_or_named(call, embedded, served, tmp_path) -> None:
    other = tmp_path / "traffic.log"
    other.write_text(served.read_text())
    assert call("convert", other, "--model", embedded, "-o", tmp_path / "t", "-q")[0] == 0
    damaged = tmp_path / "damaged.log"
    damaged.write_text("{\n" + served.read_text())
    job = ("convert", damaged, "--model", embedded, "-o", tmp_path / "u", "-q")
    refused(call(*job), 1, "is neither server responses", "--from names what it should be")
    assert call(*job, "--from", "responses", "--skip-bad")[0] == 0
    refused(call("convert", served, "--from", "coalitions", "--model", embedded, "-o", tmp_path / "v"), 1, "not a JSON")
    refused(call("convert", other, "--from", "selection", "-o", tmp_path / "v"), 1, "not valid JSON")


def test_requests_that_contradict_themselves(call, embedded, served, tmp_path) -> None:
    out = ("-o", tmp_path / "t")
    refused(call("convert", served, *out), 2, "does not say which model it is about: name it with --model")
    refused(call("convert", tmp_path / "none.jsonl", *out), 2, "There is no file")
    refused(call("convert", tmp_path / "none.jsonl", "--from", "trace", *out), 2, "There is no file")
    refused(call("convert", served, "--from", "tea", *out), 2, "--from must be one of responses, coalitions")
    refused(call("convert", served, "--model", embedded, "--to", "csv", *out), 2, "--to must be shape-moe or reference")
    refused(call("convert", served, "--model", embedded, "--to", "reference", *out), 2, "converts with --to shape-moe")
    (tmp_path / "values.csv").write_text("Layer\n")
    refused(call("convert", tmp_path / "values.csv", *out), 2, "select and score read a table of values as it is")
    (tmp_path / "s.json").write_text(json.dumps({"0": [1], "_metadata": {"total_experts": 32}}))
    refused(call("convert", tmp_path / "s.json", "--skip-bad", *out), 2, "--skip-bad is for server responses")
    assert call("convert", tmp_path / "s.json", "-o", tmp_path / "ours.json", "-q")[0] == 0
    refused(call("convert", tmp_path / "ours.json", "--model", embedded, *out), 2, "leave --model out")
    refused(call("convert", tmp_path / "ours.json", "--to", "shape-moe", *out), 2, "in that format already")


def test_outputs_are_guarded(call, embedded, served, tmp_path) -> None:
    job = ("convert", served, "--model", embedded, "-o")
    assert call(*job, tmp_path / "t", "-q")[0] == 0
    refused(call(*job, tmp_path / "t"), 2, "exists and is not empty")
    assert call(*job, tmp_path / "t", "-q", "--force")[0] == 0
    refused(call(*job, embedded / "t"), 2, "overlap")
    refused(call(*job, served), 2, "overlap")
    back = ("convert", tmp_path / "t", "-o")
    refused(call(*back, tmp_path), 2, "is a folder; choose a file")
    (tmp_path / "c.json").write_text("mine")
    refused(call(*back, tmp_path / "c.json"), 2, "exists; choose another output")
    assert (tmp_path / "c.json").read_text() == "mine"
    assert call(*back, tmp_path / "c.json", "--force", "-q")[0] == 0
    (tmp_path / "s.json").write_text(json.dumps({"0": [1], "_metadata": {"total_experts": 32}}))
    refused(
        call("convert", tmp_path / "s.json", "-o", tmp_path / "s.json", "--force"), 2, "is an input of this command"
    )
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]


def test_from_python(embedded, served, tmp_path) -> None:
    trace = shape_moe.convert(served, tmp_path / "t", model=embedded)
    assert isinstance(trace, shape_moe.Trace)
    assert trace.info.engine == "vllm"
