"""Scorer auto and limits in prune: what is chosen, why, and that it is written down."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shape_moe.architectures.moe_config import RoutingFacts
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.jobs import prune as job
from shape_moe.jobs import session
from shape_moe.jobs.choose import AUTO_METHODS, ChoiceOptions, candidates
from shape_moe.jobs.prune import PruneOptions, prune
from shape_moe.jobs.select import AUTO, SelectionJob, check_job, select
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.scoring.registry import scorers
from shape_moe.selection.rules import get_rule
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import load_selection
from shape_moe.tracing.trace import load_trace
from support.data import synthetic_trace, write_lines
from support.interruptions import stopped_after

FEW = GenerationOptions(examples=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ExampleOptions:
    file = write_lines(tmp_path_factory.mktemp("data") / "sorting.jsonl", examples("sorting", 130, seed=4))
    return ExampleOptions(DataOptions(str(file), samples=40), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def chosen(embedded, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("auto") / "out"
    options = PruneOptions(
        select=SelectionJob(SelectOptions(keep=0.4), AUTO),
        choice=ChoiceOptions(held_out_samples=40, generation=FEW),
        device="cpu",
        dtype="float32",
    )
    return prune(embedded, out, options, data=data)


def test_the_candidate_closest_to_the_dense_model_is_written(chosen, embedded, data) -> None:
    choice = chosen.selection.choice
    figures = {entry["method"]: entry["kl"]["value"] for entry in choice["tried"]}
    assert len(figures) == 2 * len(AUTO_METHODS)
    assert choice["best"] == min(figures, key=figures.get)
    method = f"{chosen.selection.scorer}/{chosen.selection.rule}, {chosen.selection.routing}"
    assert method in choice["tied"]
    assert method in choice["reason"]
    # the first of the benchmark's order among the tied ones
    order = [f"{scorer}/{rule}, {routing}" for scorer, rule in AUTO_METHODS for routing in ("drop", "reroute")]
    assert method == min(choice["tied"], key=order.index)
    again = load_selection(chosen.path)
    assert again.choice == json.loads(json.dumps(choice))
    from_trace = select_from_trace(
        load_trace(chosen.path / "shape" / "trace"),
        SelectOptions(0.4, chosen.selection.rule, chosen.selection.routing),
        scorer=chosen.selection.scorer,
    )
    assert from_trace.layers == chosen.selection.layers


def test_the_card_tells_what_was_tried(chosen) -> None:
    card = (chosen.path / "README.md").read_text()
    assert "40 held-out examples" in card
    assert chosen.selection.choice["reason"] in card


def test_an_interrupted_job_does_not_choose_again(chosen, embedded, data, tmp_path, monkeypatch) -> None:
    options = PruneOptions(
        select=SelectionJob(SelectOptions(keep=0.4), AUTO),
        choice=ChoiceOptions(held_out_samples=40, generation=FEW),
        device="cpu",
        dtype="float32",
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "record_canary", stopped_after(0, job.record_canary)[0])
        prune(embedded, tmp_path / "out", options, data=data)
    monkeypatch.setattr(job, "choose", lambda *_: pytest.fail("chosen again"))
    result = prune(embedded, tmp_path / "out", options, data=data)
    assert result.selection == chosen.selection
    names = [sorted(file.relative_to(folder) for file in folder.rglob("*")) for folder in (result.path, chosen.path)]
    assert names[0] == names[1]


def test_a_limit_decides_the_keep_rate(embedded, data, tmp_path) -> None:
    options = PruneOptions(
        choice=ChoiceOptions(limit=Limit("max_kl", 0.05), held_out_samples=60, generation=FEW),
        device="cpu",
        dtype="float32",
    )
    result = prune(embedded, tmp_path / "out", options, data=data)
    assert 0.05 < result.selection.keep < 0.95
    assert result.selection.scorer == "shape"
    tried = result.selection.choice["tried"]
    within = [entry["keep"] for entry in tried if entry["kl"]["high"] <= 0.05]
    assert result.selection.keep == min(within)
    assert result.selection.choice["limit"] == {"kind": "max_kl", "value": 0.05}
    for entry in tried:
        change = entry["exact_match_change"]
        assert change["low"] <= change["value"] <= change["high"]
    assert result.logits.passed


def test_too_few_examples_for_a_limit_are_refused_before_the_work(embedded, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(session, "load_original", lambda *_: pytest.fail("the model was loaded"))
    options = PruneOptions(choice=ChoiceOptions(limit=Limit("max_drop", 0.01), held_out_samples=60), device="cpu")
    with pytest.raises(UsageError, match=r"60 held-out examples .* below 6\.0%.*judge by 381 or more"):
        prune(embedded, tmp_path / "out", options, data=data)
    automatic = replace(options, select=SelectionJob(SelectOptions(1.0), AUTO))
    with pytest.raises(UsageError, match=r"for 16 combinations together.*judge by 865 or more"):
        prune(embedded, tmp_path / "out", automatic, data=data)
    assert list(tmp_path.iterdir()) == []


def test_nothing_within_the_limit_prunes_nothing(embedded, data, tmp_path) -> None:
    options = PruneOptions(
        select=SelectionJob(SelectOptions(1.0), "random"),  # shape removes an expert that is never used first
        choice=ChoiceOptions(limit=Limit("max_kl", 1e-9), held_out_samples=30, generation=FEW),
        device="cpu",
    )
    with pytest.raises(ShapeMoeError, match="Nothing was pruned"):
        prune(embedded, tmp_path / "out", options, data=data)
    assert not (tmp_path / "out").exists()


def test_a_finished_trace_is_not_made_again(embedded, data, tmp_path) -> None:
    trace(embedded, data, tmp_path / "trace")
    options = PruneOptions(
        select=SelectionJob(SelectOptions(keep=0.5, routing="reroute"), AUTO),
        choice=ChoiceOptions(routings=("reroute",), held_out_samples=30, generation=FEW),
        device="cpu",
    )
    result = prune(embedded, tmp_path / "out", options, trace=tmp_path / "trace")
    assert result.selection.routing == "reroute"
    assert len(result.selection.choice["tried"]) == len(AUTO_METHODS)
    assert result.selection.choice["examples"] == 30


def test_candidates_are_what_the_trace_and_the_target_allow() -> None:
    whole = synthetic_trace()
    job = SelectionJob(SelectOptions(0.5), AUTO)
    assert len(candidates(job, ChoiceOptions(), 2, whole.statistics)) == 2 * len(AUTO_METHODS)
    counted = type(whole)(whole.info, {k: v for k, v in whole.statistics.items() if "tokens" in k}, whole.coalitions)
    assert {way.scorer for way in candidates(job, ChoiceOptions(), 2, counted.statistics)} == {"shape"}
    stock = SelectionJob(SelectOptions(0.5, routing="reroute", target="stock"), AUTO)
    assert {(way.rule, way.routing) for way in candidates(stock, ChoiceOptions(), 2)} == {("uniform", "reroute")}
    named = SelectionJob(SelectOptions(0.5, rule="global"), "reap")
    assert [str(way) for way in candidates(named, ChoiceOptions(), 2)] == ["reap/global, drop"]


def test_scorers_that_say_nothing_about_top_1_routing_are_left_out() -> None:
    automatic = SelectionJob(SelectOptions(0.5), AUTO)
    tried = {way.scorer for way in candidates(automatic, ChoiceOptions(), 1)}
    assert tried == {scorer for scorer, _ in AUTO_METHODS} - {"shape"}
    model = ((0, 1, 2), 8, RoutingFacts(1, 1))
    with pytest.raises(UsageError, match=r"^Scorer shape needs top-2 routing or more, and this model's is top-1"):
        check_job(SelectionJob(SelectOptions(0.5)), *model)
    check_job(SelectionJob(SelectOptions(0.5), "reap"), *model)
    check_job(SelectionJob(SelectOptions(0.5)), (0, 1, 2), 8, RoutingFacts(2, 2))


def test_every_method_exists() -> None:
    for scorer, rule in AUTO_METHODS:
        assert scorer in scorers()
        get_rule(rule)


def test_auto_needs_examples(embedded, data, tmp_path) -> None:
    job = SelectionJob(SelectOptions(0.5), AUTO)
    with pytest.raises(UsageError, match="shape-moe prune"):
        select(synthetic_trace(), job)
    with pytest.raises(UsageError, match="shape-moe prune"):
        prune(embedded, tmp_path / "out", PruneOptions(select=job, device="cpu"), data=data)
    with pytest.raises(UsageError, match="held-out examples"):
        prune(embedded, tmp_path / "out", PruneOptions(select=job, choice=ChoiceOptions(), device="cpu"))
