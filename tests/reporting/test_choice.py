"""How a selection was chosen, and what every layer's cut costs: the report shows both where they are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import shape_moe
from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.cli.select import notes_on
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.reporting.choice import choice_section, curves_figure
from shape_moe.reporting.html import render_report
from shape_moe.reporting.material import Material
from shape_moe.selection.layer_curves import LayerCurves
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection
from shape_moe.units import NONE
from support.data import synthetic_trace
from support.selections import random_selection

TRACE = synthetic_trace(layers=3, experts=8, top_k=2)


def selected(**choice) -> Selection:
    selection = select_from_trace(TRACE, SelectOptions(keep=0.5, method=Method("shape", "coverage", "drop")))
    return replace(selection, choice={"examples": 40, **choice})


def entry(method: str, loss: float, behind: tuple[float, float, float] | None, *, keep: float = 0.5, points=None):
    ends = dict(zip(("value", "low", "high"), behind, strict=True)) if behind else None
    change = {"value": points, "low": None, "high": None} if points is not None else None
    return {"method": method, "keep": keep, "loss": loss, "behind": ends, "exact_match_change": change}


def test_candidates_stand_in_the_order_of_what_they_lose_with_their_margins() -> None:
    tried = [
        entry("reap/uniform, drop", 0.5, (0.3, 0.25, 0.35), points=-0.125),
        entry("shape/coverage, drop", 0.2, (0.0, 0.0, 0.0), points=0.0),
        entry("easy-ep/uniform, drop", 0.19, (-0.01, -4.9e-4, 0.012), points=0.02),
    ]
    tied = ["shape/coverage, drop", "easy-ep/uniform, drop"]
    section = choice_section(Material("s", selected(tried=tried, tied=tied, reason="the closest")))
    (table,) = section.tables
    assert table.headings == ("Method", "", "KL to dense", "Behind the chosen one", "Right answers")
    assert table.rows == (
        ("easy-ep/uniform, drop", "within noise", "0.19", "-0.01 [0, +0.012]", "+2"),
        ("shape/coverage, drop", "chosen", "0.2", NONE, "0"),
        ("reap/uniform, drop", "", "0.5", "+0.3 [+0.25, +0.35]", "-12"),
    )
    assert "40 examples" in section.lead
    assert section.notes == ("Chosen: the closest.",)


def test_keep_rates_are_told_apart_where_a_limit_chose_among_them() -> None:
    tried = [entry("shape/coverage, drop", 0.1, None, keep=0.75), entry("shape/coverage, drop", 0.2, None)]
    section = choice_section(Material("s", selected(tried=tried)))
    assert [row[1:4] for row in section.tables[0].rows] == [("", "75 %", "0.1"), ("chosen", "50 %", "0.2")]
    assert section.notes == ()


@pytest.mark.parametrize("selection", [None, replace(selected(), choice=None), selected(how="by the benchmark")])
def test_where_nothing_was_tried_nothing_is_shown(selection) -> None:
    assert choice_section(Material("s", selection)) is None


def layer_curves(fingerprint: str) -> LayerCurves:
    """Cut to 4 of 8 experts, the layers cost 0.1, 0.4 and 0.2."""
    sums = np.array([[2.0, 1.0], [8.0, 4.0], [4.0, 2.0]])[:, :, None, None] * np.ones((3, 2, 1, 2))
    info, options = TRACE.info, {"seed": 0.0}
    return LayerCurves(
        fingerprint, "m", "shape", options, "drop", 8, info.layers, (2, 4), ("",), [[10.0, 10.0]], sums.tolist()
    )


def test_every_layer_shows_what_its_own_cut_costs() -> None:
    selection = replace(selected(), layers={layer: list(range(4 - row)) for row, layer in enumerate(TRACE.info.layers)})
    figure = curves_figure(layer_curves(TRACE.info.fingerprint), selection)
    (bars,) = figure.data
    assert bars["y"][:2] == pytest.approx([0.1, 0.6])  # 3 experts lie between 2 (0.8) and 4 (0.4)
    assert bars["y"][2] == pytest.approx(0.4)
    assert figure.table.rows[1] == (str(TRACE.info.layers[1]), "3", "0.6")
    assert f"layer {TRACE.info.layers[1]} costs most, a KL divergence of 0.6" in figure.label


def test_a_cut_below_what_was_measured_has_no_bar() -> None:
    selection = replace(selected(), layers={layer: [0] for layer in TRACE.info.layers})
    figure = curves_figure(layer_curves(TRACE.info.fingerprint), selection)
    assert figure.data[0]["y"] == [None] * 3
    assert {row[2] for row in figure.table.rows} == {NONE}


@pytest.mark.parametrize(("fingerprint", "shown"), [(TRACE.info.fingerprint, True), ("of another model", False)])
def test_the_page_shows_curves_of_the_selections_model_alone(fingerprint, shown) -> None:
    page, names = render_report(Material("s", selected(), curves=layer_curves(fingerprint)))
    assert "layers" in names
    assert ('id="figure-curves"' in page) == shown


def test_the_report_of_a_checkpoint_reads_its_curves(checkpoint, tmp_path) -> None:

    snapshot = open_snapshot(checkpoint("olmoe"))
    selection = replace(random_selection(snapshot, "drop", "ragged"), fingerprint=fingerprint(snapshot))
    quickly = PruneOptions(check_logits=False, device="cpu")
    shape_moe.prune(snapshot.path, tmp_path / "out", quickly, selection=selection)
    shape = (len(selection.layers), 1, 1, 2)
    curves = replace(
        layer_curves(selection.fingerprint),
        num_experts=selection.num_experts,
        layers=tuple(selection.layers),
        counts=(1,),
        sums=np.ones(shape).tolist(),
    )
    curves.save(tmp_path / "out" / "shape" / "curves.json")
    shape_moe.report(tmp_path / "out", tmp_path / "r.html")
    assert "cut alone, layer" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_one_undecided_place_is_not_told_as_several() -> None:
    (told,) = [
        line
        for line in notes_on(replace(selected(), stability={"agreement": 0.9, "undecided": 1.0}))
        if "halves" in line
    ]
    assert told.endswith("; undecided places: 1")
