"""Evaluations and sweeps of a model that is read layer by layer give the figures of the model in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.evaluation import by_layers
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.harness import TaskOptions
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.evaluation.layered_bench import LayeredBench
from shape_moe.jobs import session as sessions
from shape_moe.jobs.evaluate import evaluate
from shape_moe.jobs.evaluate_by_layers import LIKELIHOOD_ALONE
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.sweep import SweepOptions, sweep
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import load_selection
from support.data import write_lines
from support.notes import Notes
from support.selections import random_selection

QUICK = EvaluateOptions(generation=GenerationOptions(examples=2), general=False)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> ExampleOptions:
    rows = [{**row, "half": str(i % 2)} for i, row in enumerate(examples("sorting", 16, seed=2, held_out=True))]
    file = write_lines(tmp_path_factory.mktemp("data") / "task.jsonl", rows)
    return ExampleOptions(DataOptions(str(file)), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pruned(embedded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    file = write_lines(folder / "calibration.jsonl", examples("sorting", 12, seed=1))
    return prune(embedded, folder / "sorting-0.4", PruneOptions(SelectOptions(0.4), device="cpu"), data=str(file)).path


def quality(measured):
    return {name: estimate.value for name, estimate in measured.quality.items()}


def test_the_figures_are_those_of_the_model_in_memory(embedded, asked, pruned, monkeypatch) -> None:
    """Masks and a checkpoint that fits; everything but free answers, in one reading for the masks."""
    snapshot = open_snapshot(embedded)
    candidates = [
        pruned,
        load_selection(pruned / "shape" / "selection.json"),
        random_selection(snapshot, "reroute", "equal"),
    ]
    options = replace(QUICK, by="half", generation=None, faithfulness=0)
    whole = evaluate(embedded, candidates, data=replace(asked, stream=False), options=options)
    monkeypatch.setattr(sessions, "load_model", lambda *_a, **_k: pytest.fail("the dense model was loaded"))
    readings, real = [], by_layers.run_streams
    monkeypatch.setattr(by_layers, "run_streams", lambda *a, **more: readings.append(len(a[2])) or real(*a, **more))
    told = Notes()
    streamed = evaluate(embedded, candidates, data=replace(asked, stream=True), options=options, progress=told)
    assert readings == [3]
    assert any("2 selections and the dense model are judged layer by layer on 16 examples" in n for n in told.said)
    assert LIKELIHOOD_ALONE in streamed.notes
    assert [found.name for found in streamed.models] == [found.name for found in whole.models]
    for ours, theirs in zip(streamed.models, whole.models, strict=True):
        assert quality(ours.sets["task"]) == pytest.approx(quality(theirs.sets["task"]), rel=1e-4, abs=1e-6)
        assert ours.classes.keys() == theirs.classes.keys()
    assert quality(streamed.models[1].sets["task"])["kl"] == pytest.approx(
        quality(streamed.models[2].sets["task"])["kl"], rel=1e-4
    )  # the checkpoint is what its mask is
    assert streamed.models[1].verdict.answers is None


def test_controls_of_faithfulness_share_a_reading(embedded, asked, pruned, monkeypatch) -> None:
    readings, real = [], LayeredBench._read
    monkeypatch.setattr(LayeredBench, "_read", lambda self, found: readings.append(len(found)) or real(self, found))
    selection = load_selection(pruned / "shape" / "selection.json")
    options = replace(QUICK, faithfulness=3, trace=str(pruned / "shape" / "trace"))
    result = evaluate(embedded, [selection], data=replace(asked, stream=True), options=options)
    assert readings == [1, 4]
    assert result.faithfulness[0].faithful


def test_what_takes_the_whole_model_is_refused(embedded, asked, pruned) -> None:
    streamed = replace(asked, stream=True)
    with pytest.raises(UsageError, match=r"--tasks runs benchmarks on the whole model.*--task-engine vllm"):
        evaluate(embedded, [], data=streamed, options=replace(QUICK, tasks=TaskOptions(("arc_easy",))))
    generation = GenerationOptions(answer_pattern="[a-z]+")
    with pytest.raises(UsageError, match="--answer-pattern judges free answers"):
        evaluate(embedded, [], data=streamed, options=replace(QUICK, generation=generation))


def test_a_sweep_takes_one_reading_and_finds_the_same(embedded, asked, tmp_path, monkeypatch) -> None:
    options = SweepOptions(
        keep_rates=(0.9, 0.5),
        methods=(Method("shape"), Method("easy-ep")),
        held_out=8,
        limit=Limit("max_kl", 0.2),
        generation=GenerationOptions(examples=2),
    )
    data = replace(asked, data=replace(asked.data, samples=8))
    whole = sweep(embedded, options, data=replace(data, stream=False))
    monkeypatch.setattr(sessions, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    readings, real = [], LayeredBench._read
    monkeypatch.setattr(LayeredBench, "_read", lambda self, found: readings.append(len(found)) or real(self, found))
    streamed = sweep(embedded, options, tmp_path / "sweep", data=replace(data, stream=True))
    assert readings == [4]
    ours, theirs = (result.recommendation.points for result in (streamed, whole))
    assert [point.selection.layers for point in ours] == [point.selection.layers for point in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert quality(one.measured) == pytest.approx(quality(other.measured), rel=1e-4, abs=1e-6)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if not path.name.startswith("recomm")) == [
        "sweep.json",
        "trace",
    ]
