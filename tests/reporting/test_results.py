"""Results of sweeps and evaluations: read whole, refused when damaged, and shown as they are."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest

from shape_moe.errors import CheckpointError, DataError
from shape_moe.evaluation.evaluated import Chosen, read_evaluation
from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.evaluation.swept import read_sweep
from shape_moe.reporting.figures.evaluation import (
    faithfulness_figure,
    footprint_figures,
    quality_figure,
    result_tables,
)
from shape_moe.reporting.figures.figure import number, with_interval
from shape_moe.reporting.figures.metrics import METRICS, error_bars, is_wide, known_metrics, value_axis
from shape_moe.reporting.figures.sweep import sweep_figure
from shape_moe.selection.method import Method
from shape_moe.selection.selection import Selection
from shape_moe.units import percent
from support.results import evaluation_document, sweep_document, write_evaluation, write_sweep

METRIC = {metric.title: metric for metric in METRICS}


def selection_like(point: dict) -> Selection:
    layers = {0: list(range(point["kept"]))}
    return Selection(None, None, None, point["scorer"], point["rule"], point["routing"], 6144, 8, layers, 0.6)


def test_a_sweep_is_read_whole(tmp_path) -> None:
    document = sweep_document()
    sweep = read_sweep(write_sweep(tmp_path).parent)
    assert sweep == read_sweep(tmp_path / "sweep.json")
    assert sweep.limit == Limit("max_kl", 0.1)
    assert (sweep.recommended, sweep.dense_size) == (document["recommended"], 61_064_000_000)
    assert len(sweep.points) == 18
    point, raw = sweep.points[3], document["points"][3]
    assert point.method == Method("shape", "coverage", "drop")
    assert (point.kept, point.size) == (raw["kept"], raw["bytes"])
    assert point.measured.quality["kl"].low == raw["quality"]["kl"]["low"]
    assert point.measured.change["perplexity"].value == raw["change"]["perplexity"]["value"]
    assert set(point.measured.health.figures) == {"loop_rate", "no_end_rate", "length", "exact_match"}
    assert sweep.points[0].measured.health is None
    assert (point.meets, point.healthy, point.fits) == (False, True, None)
    assert not point.good
    assert sweep.points[1].good


def test_an_evaluation_is_read_whole(tmp_path) -> None:
    evaluation = read_evaluation(write_evaluation(tmp_path))
    dense, pruned, masked = evaluation.models
    assert [m.kind for m in evaluation.models] == ["dense", "checkpoint", "mask"]
    assert dense.selection is None
    assert dense.sets["task"].change == {}
    assert pruned.selection == Chosen("shape", "coverage", "drop", 0.6)
    assert (evaluation.by, list(pruned.classes)) == ("kind", ["sum", "rate"])
    assert masked.footprint.device == "cuda (NVIDIA H200)"
    assert masked.footprint.peak_bytes == 41_100_000_000
    assert len(evaluation.faithfulness[0].random) == 3


def test_unknown_ends(tmp_path) -> None:
    unknown = {"value": 0.5, "low": None, "high": None}
    check = {
        "selection": "s",
        "kept": {"quality": {"kl": unknown}},
        "inverted": {"quality": {"kl": {"value": None}}},
        "random": [],
    }
    evaluation = read_evaluation(write_evaluation(tmp_path, faithfulness=[check], data=None, command=None))
    (found,) = evaluation.faithfulness
    assert found.kept.quality["kl"].value == 0.5
    assert math.isnan(found.kept.quality["kl"].low)
    assert found.inverted.quality == {}
    assert METRIC["KL to the dense model"].text(found.kept) == "0.5"
    assert (evaluation.data, evaluation.made_with.command) == (None, "")


def test_least_of_an_evaluation(tmp_path) -> None:
    models = [{"name": "m", "kind": "mask", "selection": None, "bytes": None, "sets": {}, "footprint": None}]
    evaluation = read_evaluation(write_evaluation(tmp_path, models=models, faithfulness=None))
    assert quality_figure(evaluation) is None
    assert footprint_figures(evaluation) == ()
    assert result_tables(evaluation) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "not a result of shape-moe sweep"),
        ({"verb": "evaluate"}, "not a result of shape-moe sweep"),
        ({"points": [{"keep": 0.5, "scorer": "shape", "routing": "drop"}]}, "'rule' is missing"),
        (
            {"points": [{"keep": 0.5, "scorer": "shape", "rule": "global", "routing": "lost"}]},
            "Routing must be drop or reroute, not 'lost'",
        ),
        ({"limit": {"kind": "max_size", "value": 0.1}}, "A limit is one of max_kl, max_drop, not 'max_size'"),
        ({"points": 3}, "damaged"),
        ({"recommended": 99}, "no point 99"),
        ({"dense": {"quality": {"kl": {"value": "x", "low": 0, "high": 0}}}}, "damaged"),
        ({"dense": {"quality": {"kl": {"value": 1}}}}, "'low' is missing"),
        ({"limit": []}, None),
    ],
)
def test_damaged_sweeps(tmp_path, change: dict, message: str | None) -> None:
    file = write_sweep(tmp_path, **change)
    if message is None:
        assert read_sweep(file).limit is None
        return
    with pytest.raises(DataError, match=message) as error:
        read_sweep(file)
    assert str(file) in str(error.value)


def test_files_that_are_no_results(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"sweep\.json is missing"):
        read_sweep(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_evaluation(tmp_path)
    write_sweep(tmp_path)
    with pytest.raises(DataError, match="not a result of shape-moe evaluate"):
        read_evaluation(tmp_path / "sweep.json")


def test_the_curve_shows_every_point_with_its_interval(tmp_path) -> None:
    document = sweep_document()
    sweep = read_sweep(write_sweep(tmp_path))
    figure = sweep_figure(sweep, None)
    raw = sorted((p for p in document["points"] if p["scorer"] == "reap"), key=lambda p: p["kept"])
    line = figure.data[2]
    assert line["name"] == "reap/uniform, drop"
    assert line["x"] == pytest.approx([p["bytes"] / 2**30 for p in raw])
    assert line["marker"]["symbol"] == [
        "triangle-up" if p["meets_limit"] and p["healthy"] is not False else "triangle-up-open" for p in raw
    ]
    by_name = {state.name: state for state in figure.states}
    assert list(by_name) == [
        "KL to the dense model",
        "Exact match",
        "Perplexity",
        "Same next token",
        "Generated answers",
        "Loops",
    ]
    kl = by_name["KL to the dense model"].data[2]
    assert kl["y"] == pytest.approx([p["quality"]["kl"]["value"] for p in raw])
    assert kl["error_y"]["array"] == pytest.approx(
        [p["quality"]["kl"]["high"] - p["quality"]["kl"]["value"] for p in raw]
    )
    exact = by_name["Exact match"].data[2]
    assert exact["y"] == pytest.approx([100 * p["quality"]["exact_match"]["value"] for p in raw])
    loops = by_name["Loops"].data[2]
    assert [y is None for y in loops["y"]] == [p["generation"] is None for p in raw]
    recommended = document["points"][document["recommended"]]
    assert figure.data[3]["x"] == pytest.approx([recommended["bytes"] / 2**30])
    assert by_name["Exact match"].data[3]["y"] == pytest.approx([100 * recommended["quality"]["exact_match"]["value"]])
    assert by_name["Exact match"].data[4]["y"] == pytest.approx([90.0])  # the dense model
    assert "recommended" in [swatch.text for swatch in figure.legend]
    assert "limit: a KL divergence of 0.1" in [swatch.text for swatch in figure.legend]
    ring = figure.data[3]["marker"]
    assert (ring["symbol"], ring["size"] > 2 * figure.data[0]["marker"]["size"]) == ("circle-open", True)
    assert figure.data[0]["text"] == ["40 %", "50 %", "60 %", "70 %", "80 %", "90 %"]
    assert len(figure.table.rows) == 19


def test_the_operating_point_is_the_given_selection(tmp_path) -> None:
    document = sweep_document()
    sweep = read_sweep(write_sweep(tmp_path))
    given = selection_like(document["points"][8])
    assert sweep.point_of(given) == sweep.points[8]
    assert "this selection" in [swatch.text for swatch in sweep_figure(sweep, given).legend]
    unknown = replace(given, scorer="mine")
    assert sweep.point_of(unknown) is None
    assert sweep_figure(sweep, unknown).data[3]["x"] == []
    assert sweep.point_of(None) == sweep.points[document["recommended"]]


def test_limits_are_drawn_where_they_belong(tmp_path) -> None:
    def lines(**changes) -> dict[str, list[float]]:
        figure = sweep_figure(read_sweep(write_sweep(tmp_path, **changes)), None)
        return {state.name: [shape["y0"] for shape in state.layout["shapes"]] for state in figure.states}

    by_kl = lines()
    assert by_kl.pop("KL to the dense model") == [0.1]
    assert not any(by_kl.values())
    by_drop = lines(limit={"kind": "max_drop", "value": 0.02})
    assert by_drop.pop("Exact match") == pytest.approx([88.0])
    assert not any(by_drop.values())
    assert not any(lines(limit=None).values())


def test_many_ways_to_choose_can_be_told_apart(tmp_path) -> None:
    methods = tuple((scorer, rule) for scorer in ("shape", "reap", "ean", "easy-ep") for rule in ("a", "b", "c"))
    figure = sweep_figure(read_sweep(write_sweep(tmp_path, methods=methods)), None)
    marks = [(line["line"]["color"], line["marker"]["symbol"][0].removesuffix("-open")) for line in figure.data[:12]]
    assert len(set(marks)) == 12
    shown = [(f"@{swatch.colours[0]}", swatch.kind) for swatch in figure.legend[:12]]
    assert shown == marks


def test_without_bytes_the_keep_rate_is_the_axis(tmp_path) -> None:
    document = sweep_document()
    for point in document["points"]:
        point["bytes"] = None
    figure = sweep_figure(read_sweep(write_sweep(tmp_path, points=document["points"])), None)
    assert "%" in figure.layout["xaxis"]["title"]["text"]
    assert figure.data[0]["x"] == pytest.approx(sorted(100 * p["keep"] for p in document["points"][:6]))


def test_quality_of_every_model_and_set(tmp_path) -> None:
    document = evaluation_document()
    figure = quality_figure(read_evaluation(write_evaluation(tmp_path)))
    task, also = figure.data
    assert task["y"] == [model["name"] for model in document["models"]]
    state = next(state for state in figure.states if state.name == "KL to the dense model")
    assert state.data[0]["x"] == [m["sets"]["task"]["quality"]["kl"]["value"] for m in document["models"]]
    assert state.data[1]["x"] == [m["sets"]["also"]["quality"]["kl"]["value"] for m in document["models"]]
    exact = next(state for state in figure.states if state.name == "Exact match")
    assert exact.data[1]["x"] == [None] * 3
    assert also["name"] == "other data"
    assert len(figure.table.rows) == 6


@pytest.mark.parametrize("check", [{"selection": "s"}, [{"selection": "s", "kept": {"kl": 1}}]])
def test_damaged_checks(tmp_path, check: object) -> None:
    with pytest.raises(DataError, match="damaged"):
        read_evaluation(write_evaluation(tmp_path, faithfulness=check))


def test_a_dense_model_at_zero_keeps_the_axis_linear(tmp_path) -> None:
    models = copy.deepcopy(evaluation_document()["models"])
    for model, kl in zip(models, (0.0, 1e-4, 0.9), strict=True):
        model["sets"]["task"]["quality"]["kl"] = {"value": kl, "low": kl, "high": kl}
    figure = quality_figure(read_evaluation(write_evaluation(tmp_path, models=models)))
    assert figure.states[0].layout["xaxis"]["type"] == "linear"
    assert figure.states[0].data[0]["x"] == [0.0, 1e-4, 0.9]


def test_memory_and_speed(tmp_path) -> None:
    document = evaluation_document()
    figures = {figure.name: figure for figure in footprint_figures(read_evaluation(write_evaluation(tmp_path)))}
    memory = figures["footprint-peak-bytes"].data[0]
    assert memory["x"] == pytest.approx([m["footprint"]["peak_bytes"] / 2**30 for m in document["models"]])
    assert memory["marker"]["color"] == ["@dropped", "@kept", "@kept"]
    assert figures["footprint-weights"].data[0]["x"] == pytest.approx([m["bytes"] / 2**30 for m in document["models"]])
    speed = figures["footprint-decode-tokens-per-second"]
    assert speed.data[0]["x"] == [m["footprint"]["decode_tokens_per_second"] for m in document["models"]]
    assert "higher is better" in speed.label


def test_models_of_the_same_name_stay_apart(tmp_path) -> None:
    models = copy.deepcopy(evaluation_document()["models"])
    for place, model in enumerate(models):
        model["name"] = "/a/very/long/path/that/ends/in/the/same/folder" if place else "dense"
    figure = quality_figure(read_evaluation(write_evaluation(tmp_path, models=models)))
    assert len(set(figure.data[0]["y"])) == 3


def test_controls_and_tables(tmp_path) -> None:
    evaluation = read_evaluation(write_evaluation(tmp_path))
    figure = faithfulness_figure(evaluation.faithfulness[0])
    assert figure.data[0]["y"][:2] == ["as selected", "worst experts instead"]
    assert figure.states[0].data[0]["x"] == [0.14, 4.9, 1.1, 1.3, 1.2]
    benchmarks, by_class, _ = result_tables(evaluation)
    assert benchmarks.rows[0] == ("Qwen/Qwen3-30B-A3B", "gsm8k", "exact_match,strict-match", "0.890 [0.873, 0.907]")
    assert [row[0] for row in by_class.rows] == ["sum", "rate (worst)"]


def test_error_bars_stay_on_the_axis() -> None:
    estimates = [Estimate(1.0, -0.5, 2.0), None, Estimate(3.0, math.nan, 4.0)]
    bars = error_bars(estimates, log=False)
    assert (bars["array"], bars["arrayminus"]) == ([1.0, None, None], [1.5, None, None])
    assert error_bars(estimates, log=True)["arrayminus"] == [0.9, None, None]


def test_wide_ranges_are_logarithmic_with_readable_ticks() -> None:
    narrow = [Estimate(v, v, v) for v in (0.5, 2.0)]
    wide = [Estimate(v, v, v) for v in (0.01, 2.0)]
    assert not is_wide(narrow)
    assert is_wide(wide)
    assert not is_wide([Estimate(0.0, 0.0, 0.0), *wide])
    assert value_axis(narrow, log=False)["type"] == "linear"
    axis = value_axis(wide, log=True)
    assert min(axis["tickvals"]) < 0.01
    assert max(axis["tickvals"]) > 2
    assert "0.05" in axis["ticktext"]
    wider = value_axis([Estimate(v, v, v) for v in (1e-5, 2.0)], log=True)
    assert wider["ticktext"][:3] == ["0.000001", "0.00001", "0.0001"]


def test_intervals_are_told_where_they_are_known() -> None:
    assert with_interval("x", Estimate(0.5, 0.25, 0.75)) == "x [0.250, 0.750]"
    for low, high in ((math.nan, 1.0), (0.0, math.nan)):
        assert not Estimate(0.5, low, high).has_interval
        assert with_interval("x", Estimate(0.5, low, high)) == "x"


def test_what_rounds_to_zero_has_no_minus() -> None:
    assert [percent(-1e-9), percent(-0.0), percent(-0.001)] == [
        f"{text}\N{NO-BREAK SPACE}%" for text in ("0.0", "0.0", "-0.1")
    ]
    assert [number(-0.0), number(-1234.4)] == ["0", "-1,234"]


def test_metrics_as_text(tmp_path) -> None:
    sweep = read_sweep(write_sweep(tmp_path))
    measured = sweep.points[3].measured
    assert METRIC["Exact match"].text(measured) == "83\N{NO-BREAK SPACE}% [80, 86]"
    assert METRIC["Perplexity"].text(measured).startswith("\N{MULTIPLICATION SIGN}1.13 [")
    assert METRIC["Loops"].text(sweep.points[0].measured) == "\N{EN DASH}"
    assert METRIC["Exact match"].line == "Exact match, % of examples; higher is better."
    assert [m.title for m in known_metrics([sweep.points[0].measured])] == [
        *("KL to the dense model", "Exact match", "Perplexity", "Same next token")
    ]


def test_numbers_that_json_lacks(tmp_path) -> None:
    document = sweep_document()
    document["points"][0]["quality"]["kl"] = {"value": math.inf, "low": math.nan, "high": math.inf}
    (tmp_path / "sweep.json").write_text(json.dumps(document))
    figure = sweep_figure(read_sweep(tmp_path), None)
    assert figure.states[0].data[0]["y"][-1] is None
    assert figure.states[0].data[0]["error_y"]["array"][-1] is None
