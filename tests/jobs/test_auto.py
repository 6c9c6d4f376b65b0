"""Scorer auto and limits in prune: what is chosen, why, and that it is written down."""

from __future__ import annotations

import html
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.keep_rate import Limit, Point
from shape_moe.evaluation.measures import Measured
from shape_moe.jobs import auto as auto_module
from shape_moe.jobs import prune_run, session
from shape_moe.jobs.auto import AUTO_METHODS, ChoiceOptions, methods_to_try, tied_with
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import AUTO, check_options, select
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.pruning import logits
from shape_moe.scoring.registry import scorers
from shape_moe.selection.method import Method
from shape_moe.selection.rules import get_rule
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection, load_selection, whole_selection
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
        select=SelectOptions(keep=0.4, method=Method(AUTO)),
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
    method = str(chosen.selection.method)
    assert method in choice["tied"]
    assert method in choice["reason"]
    # the first of the benchmark's order among the tied ones
    order = [str(Method(*pair, routing)) for pair in AUTO_METHODS for routing in ("drop", "reroute")]
    assert method == min(choice["tied"], key=order.index)
    again = load_selection(chosen.path)
    assert again.choice == json.loads(json.dumps(choice))
    from_trace = select_from_trace(
        load_trace(chosen.path / "shape" / "trace"), SelectOptions(0.4, chosen.selection.method)
    )
    assert from_trace.layers == chosen.selection.layers


def test_the_card_tells_what_was_tried(chosen) -> None:
    card = (chosen.path / "README.md").read_text()
    assert "40 held-out examples" in card
    assert chosen.selection.choice["reason"] in html.unescape(card)


def test_an_interrupted_job_does_not_choose_again(chosen, embedded, data, tmp_path, monkeypatch) -> None:
    options = PruneOptions(
        select=SelectOptions(keep=0.4, method=Method(AUTO)),
        choice=ChoiceOptions(held_out_samples=40, generation=FEW),
        device="cpu",
        dtype="float32",
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logits, "record_canary", stopped_after(0, logits.record_canary)[0])
        prune(embedded, tmp_path / "out", options, data=data)
    monkeypatch.setattr(prune_run, "auto_select", lambda *_: pytest.fail("chosen again"))
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
    automatic = replace(options, select=SelectOptions(1.0, method=Method(AUTO)))
    with pytest.raises(UsageError, match=r"for 16 methods together.*judge by 865 or more"):
        prune(embedded, tmp_path / "out", automatic, data=data)
    assert list(tmp_path.iterdir()) == []


def test_nothing_within_the_limit_prunes_nothing(embedded, data, tmp_path) -> None:
    options = PruneOptions(
        select=SelectOptions(1.0, method=Method("random")),  # shape removes an expert that is never used first
        choice=ChoiceOptions(limit=Limit("max_kl", 1e-9), held_out_samples=30, generation=FEW),
        device="cpu",
    )
    with pytest.raises(ShapeMoeError, match="Nothing was pruned"):
        prune(embedded, tmp_path / "out", options, data=data)
    assert not (tmp_path / "out").exists()


def test_a_finished_trace_is_not_made_again(embedded, data, tmp_path) -> None:
    trace(embedded, data, tmp_path / "trace")
    options = PruneOptions(
        select=SelectOptions(keep=0.5, method=Method(AUTO, routing="reroute")),
        choice=ChoiceOptions(routings=("reroute",), held_out_samples=30, generation=FEW),
        device="cpu",
    )
    result = prune(embedded, tmp_path / "out", options, trace=tmp_path / "trace")
    assert result.selection.routing == "reroute"
    assert len(result.selection.choice["tried"]) == len(AUTO_METHODS)
    assert result.selection.choice["examples"] == 30


def test_candidates_are_what_the_trace_and_the_target_allow() -> None:
    whole = synthetic_trace()
    job = SelectOptions(0.5, method=Method(AUTO))
    assert len(methods_to_try(job.method, ChoiceOptions(), 2, whole.statistics)) == 2 * len(AUTO_METHODS)
    counted = type(whole)(whole.info, {k: v for k, v in whole.statistics.items() if "tokens" in k}, whole.coalitions)
    assert {way.scorer for way in methods_to_try(job.method, ChoiceOptions(), 2, counted.statistics)} == {"shape"}
    stock = SelectOptions(0.5, method=Method(AUTO, routing="reroute", target="stock"))
    assert {(way.rule, way.routing) for way in methods_to_try(stock.method, ChoiceOptions(), 2)} == {
        ("uniform", "reroute")
    }
    named = SelectOptions(0.5, method=Method("reap", "global"))
    assert [str(way) for way in methods_to_try(named.method, ChoiceOptions(), 2)] == ["reap/global, drop"]


def test_scorers_that_say_nothing_about_top_1_routing_are_left_out() -> None:
    automatic = SelectOptions(0.5, method=Method(AUTO))
    tried = {way.scorer for way in methods_to_try(automatic.method, ChoiceOptions(), 1)}
    assert tried == {scorer for scorer, _ in AUTO_METHODS} - {"shape"}
    model = ((0, 1, 2), 8, RouterFacts(1, 1))
    with pytest.raises(UsageError, match=r"^Scorer shape needs top-2 routing or more, and this model's is top-1"):
        check_options(SelectOptions(0.5), *model)
    check_options(SelectOptions(0.5, method=Method("reap")), *model)
    check_options(SelectOptions(0.5), (0, 1, 2), 8, RouterFacts(2, 2))


def test_every_method_exists() -> None:
    for scorer, rule in AUTO_METHODS:
        assert scorer in scorers()
        get_rule(rule)


def test_auto_needs_examples(embedded, data, tmp_path) -> None:
    job = SelectOptions(0.5, method=Method(AUTO))
    with pytest.raises(UsageError, match="shape-moe prune"):
        select(synthetic_trace(), job)
    with pytest.raises(UsageError, match="shape-moe prune"):
        prune(embedded, tmp_path / "out", PruneOptions(select=job, device="cpu"), data=data)
    with pytest.raises(UsageError, match="held-out examples"):
        prune(embedded, tmp_path / "out", PruneOptions(select=job, choice=ChoiceOptions(), device="cpu"))


class Noise:
    """A bench where some selections are tied with the best one."""

    def __init__(self, tied: set[str]) -> None:
        self.names = tied

    def tied(self, selection: Selection, _best: Selection) -> bool:
        return selection.scorer in self.names


def points_of(figures: dict[str, float]) -> list[Point]:
    whole = whole_selection([0], 4)
    return [
        Point(Method(name), replace(whole, scorer=name), 1, Measured({"kl": Estimate(kl, kl, kl)}))
        for name, kl in figures.items()
    ]


def test_ties_within_noise_go_to_the_earlier_method() -> None:
    points = points_of({"a": 0.3, "b": 0.2, "c": 0.1})
    assert tied_with(2, points, Noise(set())) == [2]
    assert tied_with(2, points, Noise({"b"})) == [1, 2]
    assert tied_with(2, points, Noise({"a", "c"})) == [0, 2]


@pytest.mark.parametrize(
    ("tied", "chosen", "said"),
    [
        (set(), "c", "c/coverage, drop with a KL divergence of 0.1 on held-out examples; clearly behind, nearest "),
        ({"b"}, "b", "within noise of it: c/coverage, drop (best by its figure: c/coverage, drop, 0.1; ties go to"),
    ],
)
def test_the_preferred_one_of_those_tied_is_taken(tied, chosen, said) -> None:
    points = points_of({"a": 0.3, "b": 0.2, "c": 0.1})
    by_scorer = {point.method.scorer: point for point in points}
    bench = Noise(tied)
    bench.judge = lambda selection: by_scorer[selection.scorer].measured
    search = SimpleNamespace(
        bench=bench,
        methods=[point.method for point in points],
        measuring=lambda *_: nullcontext(lambda asked: [by_scorer[method.scorer] for method, _ in asked]),
    )
    selection, record = auto_module._closest(search, 0.5)
    assert selection.scorer == chosen
    assert record["best"] == "c/coverage, drop"
    assert record["tied"] == [f"{name}/coverage, drop" for name in sorted({*tied, "c"})]
    assert said in record["reason"]
