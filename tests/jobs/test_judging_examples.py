"""What a model is judged by that comes from a selection or from merged traces: never what it was made from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.main import run
from shape_moe.demo.tasks import examples
from shape_moe.evaluation.subjects import Candidate, seen_by
from shape_moe.evaluation.verdict import Word
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.planning import chosen_by
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import merge, trace
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import load_selection
from shape_moe.tracing.trace import load_trace
from support.data import write_lines

OPTIONS = PruneOptions(device="cpu", check_logits=False, judgement=JudgementOptions(general=False))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """30 examples of each of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    return {task: write_lines(folder / f"{task}.jsonl", examples(task, 30, seed=1)) for task in ("sorting", "addition")}


@pytest.fixture(scope="module")
def traces(embedded, files, tmp_path_factory):
    """Traces of twelve examples of each, and both put together."""
    folder = tmp_path_factory.mktemp("traces")
    for task, file in files.items():
        trace(embedded, ExampleOptions(DataOptions(str(file), samples=12), device="cpu"), folder / task)
    merge([folder / "sorting", folder / "addition"], folder / "both")
    return folder


def pruned(embedded, out, data=None, options=OPTIONS, **given):
    return prune(embedded, out, options, data=data, **given).judgement


def test_a_selection_is_judged_by_what_its_trace_has_not_seen(embedded, files, traces, tmp_path) -> None:
    traced = load_trace(traces / "sorting")
    chosen = select_from_trace(traced, SelectOptions(0.9))
    chosen.save(tmp_path / "chosen.json")
    found = pruned(embedded, tmp_path / "out", str(files["sorting"]), selection=tmp_path / "chosen.json")
    (outcome,) = found.verdict.outcomes
    assert outcome.examples == 18  # of 30, of which 12 were traced
    assert found.verdict.word is Word.NO_LOSS
    records = load_records(DataOptions(str(files["sorting"])))
    assert seen_by(None, load_selection(tmp_path / "chosen.json")).count(records) == 12
    assert not any("not known" in line for line in found.lines())
    nothing = pruned(embedded, tmp_path / "none", selection=tmp_path / "chosen.json")
    assert nothing.verdict.word is Word.NOT_MEASURED
    assert "Give others with --data." in nothing.verdict.reason


def test_what_decided_between_candidates_counts_as_seen_beside_what_was_traced(files, traces) -> None:
    traced, records = load_trace(traces / "sorting"), load_records(DataOptions(str(files["sorting"])))
    fresh = [record for record in records if record not in seen_by(traced, None)]
    chosen = chosen_by(select_from_trace(traced, SelectOptions(0.9)), fresh[:5])
    model = Candidate("pruned", None, chosen, traced)
    assert [record in model.seen for record in fresh] == [True] * 5 + [False] * (len(fresh) - 5)
    assert model.seen.count(records) == 12 + 5
    assert model.seen.complete
    assert seen_by(traced, replace(chosen, seen=None)).complete
    assert not seen_by(None, replace(chosen, seen=None)).complete


def test_a_selection_of_unknown_origin_is_judged_and_that_is_said(embedded, files, traces, tmp_path) -> None:
    chosen = replace(select_from_trace(load_trace(traces / "sorting"), SelectOptions(0.9)), seen=None)
    found = pruned(embedded, tmp_path / "out", str(files["sorting"]), selection=chosen)
    assert found.verdict.outcomes[0].examples == 30
    assert "It is not known whether calibration has seen these examples." in found.lines()


def test_merged_traces_are_judged_by_what_neither_has_seen(embedded, files, traces, tmp_path) -> None:
    options = PruneOptions(SelectOptions(0.9), device="cpu", check_logits=False, judgement=OPTIONS.judgement)
    found = pruned(embedded, tmp_path / "out", options=options, trace=traces / "both")
    assert {outcome.name: outcome.examples for outcome in found.verdict.outcomes} == {"addition": 18, "sorting": 18}
    assert found.verdict.word in {Word.NO_LOSS, Word.LOSS, Word.DAMAGED}


def test_why_a_merged_trace_is_not_judged_is_said(embedded, files, traces, tmp_path) -> None:
    options = PruneOptions(SelectOptions(0.9), device="cpu", check_logits=False, judgement=OPTIONS.judgement)
    trace(embedded, examples("lookup", 12, seed=1), tmp_path / "memory")
    merge([traces / "sorting", tmp_path / "memory"], tmp_path / "both")
    found = pruned(embedded, tmp_path / "out", options=options, trace=tmp_path / "both")
    assert found.verdict.word is Word.NOT_MEASURED
    assert found.verdict.reason == "The trace was made from records in memory. Give others with --data."
    given = pruned(embedded, tmp_path / "given", str(files["addition"]), options, trace=tmp_path / "both")
    assert given.verdict.outcomes[0].examples == 30
    gone = write_lines(tmp_path / "gone.jsonl", examples("lookup", 20, seed=1))
    trace(embedded, ExampleOptions(DataOptions(str(gone), samples=12), device="cpu"), tmp_path / "lost")
    gone.unlink()
    alone = pruned(embedded, tmp_path / "alone", options=options, trace=tmp_path / "lost")
    assert "gone.jsonl" in alone.verdict.reason
    merge([traces / "sorting", tmp_path / "lost"], tmp_path / "half")
    half = pruned(embedded, tmp_path / "other", options=options, trace=tmp_path / "half")
    assert [outcome.examples for outcome in half.verdict.outcomes] == [18]
    assert any("gone.jsonl" in line for line in half.lines())


def test_the_command_takes_examples_that_only_judge(embedded, files, traces, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ["prune", str(embedded), "--keep", "0.9", "--trace", str(traces / "addition"), "--device", "cpu"]
    arguments += ["--no-logits", "--no-general", "-o", str(out), "--json", "--data", str(files["sorting"])]
    arguments += ["--scorer", "shape"]
    assert run([*arguments, "--samples", "20"]) == 0
    found = json.loads(capsys.readouterr().out)["judgement"]
    assert [outcome["examples"] for outcome in found["outcomes"]] == [20]
    assert run([*arguments, "--no-judge", "--force"]) == 2
    assert "leave --data out" in capsys.readouterr().err
