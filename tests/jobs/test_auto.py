"""Scorer auto and limits in prune: what is chosen, why, and that it is written down."""

from __future__ import annotations

import html
import json
from contextlib import nullcontext
from dataclasses import replace
from math import nan
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
from shape_moe.jobs import prune_options, prune_run, session
from shape_moe.jobs.auto import Choice, tied_with
from shape_moe.jobs.choice import ChoiceOptions, methods_to_try, pairs_to_try
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import AUTO, check_options, select
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.progress import SILENT
from shape_moe.pruning import logits
from shape_moe.scoring.registry import scorers
from shape_moe.selection.layer_curves import load_curves
from shape_moe.selection.method import Method
from shape_moe.selection.recommended import in_order
from shape_moe.selection.rules import get_rule
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection, load_selection, whole_selection
from shape_moe.tracing.trace import load_trace
from support.data import synthetic_trace, write_lines
from support.interruptions import stopped_after

FEW = GenerationOptions(examples=8)
PAIRS = pairs_to_try(equal_counts=False)
MEASURED = sum(rule == "measured" for _, rule in PAIRS)


def timeless(selection: Selection) -> Selection:
    return replace(selection, choice={**selection.choice, "seconds": 0})


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
    assert len(figures) == 2 * (len(PAIRS) - MEASURED) + MEASURED
    measured = {name for name in figures if "/measured" in name}
    assert len({name.split(", ")[1] for name in measured}) == 1  # in the routing that was settled
    assert choice["best"] == min(figures, key=figures.get)
    method = str(chosen.selection.method)
    assert method in choice["tied"]
    assert method in choice["reason"]
    # the first of the benchmark's order among the tied ones
    assert method == choice["tied"][0]
    assert choice["tied"] == [str(m) for m in in_order([Method.parse(name) for name in choice["tied"]], 0.4)]
    behind = {entry["method"]: entry["behind"] for entry in choice["tried"]}
    assert behind[method] == {"value": 0.0, "low": 0.0, "high": 0.0}
    for name, margin in behind.items():
        assert margin["low"] <= margin["value"] <= margin["high"]
        assert margin["value"] == pytest.approx(figures[name] - figures[method], abs=1e-12)
    assert 0 < choice["seconds"] < 600
    again = load_selection(chosen.path)
    assert again.choice == json.loads(json.dumps(choice))
    curves = chosen.path / "shape" / "curves.json"
    from_trace = select_from_trace(
        load_trace(chosen.path / "shape" / "trace"),
        SelectOptions(0.4, chosen.selection.method, curves=load_curves(curves) if curves.is_file() else None),
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
    assert timeless(result.selection) == timeless(chosen.selection)
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
    assert result.selection.method == Method("easy-ep", "coverage")
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
    with pytest.raises(UsageError, match=r"60 held-out examples .* below 6\.1 %.*judge by 381 or more"):
        prune(embedded, tmp_path / "out", options, data=data)
    automatic = replace(options, select=SelectOptions(1.0, method=Method(AUTO)))
    with pytest.raises(UsageError, match=r"for 8 methods together.*judge by"):
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
    assert len(result.selection.choice["tried"]) == len(PAIRS)
    assert result.selection.choice["examples"] == 30


def test_candidates_are_what_the_trace_and_the_target_allow() -> None:
    whole = synthetic_trace()
    job = SelectOptions(0.5, method=Method(AUTO))
    assert len(methods_to_try(job.method, ChoiceOptions(), 2, whole.statistics)) == 2 * len(PAIRS)
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
    assert tried == {scorer for scorer, _ in PAIRS} - {"shape"}
    model = ((0, 1, 2), 8, RouterFacts(1, 1))
    with pytest.raises(UsageError, match=r"^Scorer shape needs top-2 routing or more, and this model's is top-1"):
        check_options(SelectOptions(0.5), *model)
    check_options(SelectOptions(0.5, method=Method("reap")), *model)
    check_options(SelectOptions(0.5), (0, 1, 2), 8, RouterFacts(2, 2))


def test_every_method_exists() -> None:
    for scorer, rule in (*pairs_to_try(equal_counts=False, effort="thorough"), *pairs_to_try(equal_counts=True)):
        assert scorer in scorers()
        get_rule(rule)


def test_auto_needs_examples(embedded, data, tmp_path) -> None:
    job = SelectOptions(0.5, method=Method(AUTO))
    with pytest.raises(UsageError, match="shape-moe prune"):
        select(synthetic_trace(), job)
    with pytest.raises(UsageError, match="held-out examples"):
        prune(embedded, tmp_path / "out", PruneOptions(select=job, choice=ChoiceOptions(), device="cpu"))


def test_a_short_request_judges_candidates(embedded, data, tmp_path, monkeypatch) -> None:
    asked = []

    def chosen_instead(snapshot, plan, trace, select, choice, *_rest) -> Selection:
        asked.append((select.method.scorer, choice, len(plan.session.calibrator.records), len(plan.held_out.records)))
        raise ShapeMoeError("enough")

    monkeypatch.setattr(prune_run, "auto_select", chosen_instead)
    with pytest.raises(ShapeMoeError, match="enough"):
        prune(embedded, tmp_path / "out", PruneOptions(device="cpu"), data=data.data.files[0], keep=0.5)
    (scorer, choice, calibration, held_out), *_ = asked
    assert (scorer, choice) == (AUTO, ChoiceOptions())
    assert (calibration, held_out) == (69, 34)  # two to one, of what is not kept to report by


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_where_nothing_is_judged_the_recommended_method_is_taken(embedded, tmp_path, monkeypatch, effort) -> None:
    monkeypatch.setattr(prune_run, "auto_select", lambda *_: pytest.fail("judged"))
    count = 60 if effort == "fast" else 12
    file = write_lines(tmp_path / "d.jsonl", examples("sorting", count, seed=4))
    options = PruneOptions(
        SelectOptions(0.5, Method(AUTO)),
        device="cpu",
        choice=ChoiceOptions(effort=effort),
        judgement=None,
        check_logits=False,
    )
    result = prune(embedded, tmp_path / "out", options, data=DataOptions(str(file)))
    assert result.selection.method == Method("easy-ep", "coverage")
    told = " ".join(result.notes)
    assert ("recommended method was taken (easy-ep/coverage, drop): only 4 examples" in told) == (effort == "default")
    insisting = replace(options, choice=ChoiceOptions(insist=True))
    tiny = write_lines(tmp_path / "tiny.jsonl", examples("sorting", 3, seed=4))
    with pytest.raises(ShapeMoeError, match="too few to calibrate with some and judge by others"):
        prune(embedded, tmp_path / "no", insisting, data=DataOptions(str(tiny)))


def test_a_trace_without_statistics_gets_a_method_that_it_allows() -> None:
    asked = PruneOptions(SelectOptions(0.5, Method(AUTO)), choice=ChoiceOptions())
    without = prune_options.without_choice
    assert without(asked).select.method == Method("easy-ep", "coverage")
    assert without(asked, ["tokens"], 2).select.method == Method("shape", "coverage")
    assert without(asked, ["tokens"], 1).select.method == Method("frequency", "uniform")
    rerouted = replace(asked, choice=ChoiceOptions(routings=("reroute",)))
    assert without(rerouted).select.method == Method("replacement", "coverage", "reroute")


def test_both_gate_scales_are_tried_where_a_model_has_them() -> None:
    moe = SimpleNamespace(has_gate_scale=True)
    tried = [str(m) for m in methods_to_try(Method(AUTO), ChoiceOptions(routings=("reroute",)), 2, None, moe)]
    assert tried[:2] == ["easy-ep/coverage, reroute, trained", "easy-ep/coverage, reroute"]
    named = methods_to_try(Method(AUTO), ChoiceOptions(routings=("reroute",), keeps_gate_scale=True), 2, None, moe)
    assert {method.gate_scale for method in named} == {"survivors"}
    assert str(in_order([Method.parse(name) for name in reversed(tried)], 0.6)[0]) == tried[0]


class Noise:
    """A bench where some selections are tied with the best one."""

    def __init__(self, tied: set[str], losses: dict[str, float] | None = None) -> None:
        self.names, self.known = tied, losses or {}

    def tied(self, selection: Selection, _best: Selection) -> bool:
        return selection.scorer in self.names

    def losses(self, selection: Selection) -> dict[str, float]:
        return {"": self.known[selection.scorer]}

    def loss(self, selection: Selection) -> float:
        return self.known[selection.scorer]

    def behind(self, selection: Selection, other: Selection) -> Estimate:
        return Estimate(self.loss(selection) - self.loss(other), nan, nan)


def points_of(figures: dict[str, float]) -> list[Point]:
    whole = whole_selection([0], 4)
    return [
        Point(Method(name, "uniform"), replace(whole, scorer=name), 1, Measured({"kl": Estimate(kl, kl, kl)}))
        for name, kl in figures.items()
    ]


def test_ties_within_noise_are_found() -> None:
    points = points_of({"a": 0.3, "b": 0.2, "c": 0.1})
    assert tied_with(2, points, Noise(set())) == [2]
    assert tied_with(2, points, Noise({"b"})) == [1, 2]
    assert tied_with(2, points, Noise({"a", "c"})) == [0, 2]


@pytest.mark.parametrize(
    ("tied", "chosen", "said"),
    [
        (set(), "reap", "reap/uniform, drop with a KL divergence of 0.1 on held-out examples; clearly behind, nearest"),
        (
            {"shape"},
            "shape",
            "within noise of it: reap/uniform, drop (best by its figure: reap/uniform, drop, 0.1; ties",
        ),
        ({"easy-ep", "shape"}, "easy-ep", "within noise of it: shape/coverage, drop or reap/uniform, drop (best by"),
    ],
)
def test_the_preferred_one_of_those_tied_is_taken(tied, chosen, said) -> None:
    points = points_of({"easy-ep": 0.3, "shape": 0.2, "reap": 0.1})
    rules = {"easy-ep": "coverage", "shape": "coverage", "reap": "uniform"}
    points = [replace(point, method=Method(point.method.scorer, rules[point.method.scorer])) for point in points]
    by_scorer = {point.method.scorer: point for point in points}
    bench = Noise(tied, {"easy-ep": 0.3, "shape": 0.2, "reap": 0.1})
    bench.judge = lambda selection: by_scorer[selection.scorer].measured
    bench.seconds = 0.0
    search = SimpleNamespace(
        bench=bench,
        methods=[point.method for point in points],
        measuring=lambda *_: nullcontext(lambda asked: [by_scorer[method.scorer] for method, _ in asked]),
        progress=SILENT,
    )
    selection, record = Choice(search, 0.5, ChoiceOptions(), None).closest()
    assert selection.scorer == chosen
    assert record["best"] == "reap/uniform, drop"
    assert sorted(record["tied"]) == sorted(f"{n}/{rules[n]}, drop" for n in {*tied, "reap"})
    assert said in record["reason"]
