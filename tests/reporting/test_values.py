"""Values, layers and coverage: the numbers of the figures against other ways to find them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shape_moe.reporting.figures.coverage import coverage_curves, coverage_figure, experts_needed
from shape_moe.reporting.figures.figure import number, packed, plain, shortened, smallest_integers
from shape_moe.reporting.figures.layers import kept_mass, layer_figure
from shape_moe.reporting.figures.values import best_experts, brightness, heat_map, shares
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.rules import layer_ranks
from shape_moe.selection.select import SelectOptions, select_from_scores, select_from_trace
from shape_moe.units import percent
from support.data import routing_trace
from support.figures import unpacked


def make_scores(layers: int = 5, experts: int = 12, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    values = rng.lognormal(sigma=1.5, size=(layers, experts)) - 0.3
    values[1, 4:7] = 0.0
    return Scores("made-up", tuple(range(2, 2 + layers)), values, rng.integers(0, 99, (layers, experts)).astype(float))


def test_shares_leave_negative_values_out() -> None:
    scores = make_scores()
    share = shares(scores)
    for row, values in enumerate(scores.values):
        positive = [max(value, 0.0) for value in values]
        assert share[row] == pytest.approx([value / sum(positive) for value in positive])
    empty = replace(scores, values=-np.ones_like(scores.values))
    assert not shares(empty).any()


def test_kept_mass_is_what_the_selection_records_and_what_is_added_up_by_hand() -> None:
    scores = make_scores()
    selection = select_from_scores(scores, SelectOptions(keep=0.5))
    mass = kept_mass(selection, scores)
    for row, (layer, ids) in enumerate(selection.layers.items()):
        positive = [max(value, 0.0) for value in scores.values[row]]
        assert mass[row] == pytest.approx(sum(positive[i] for i in ids) / sum(positive))
        assert mass[row] == pytest.approx(selection.mass_kept[layer])
    assert kept_mass(selection, None) == pytest.approx(mass)


def test_a_layer_without_value_has_no_kept_mass() -> None:
    scores = make_scores()
    values = scores.values.copy()
    values[3] = 0.0
    scores = replace(scores, values=values)
    selection = select_from_scores(scores, SelectOptions(keep=0.5))
    assert np.isnan(kept_mass(selection, scores)).tolist() == [False, False, False, True, False]
    assert np.isnan(kept_mass(selection, None)).tolist() == [False, False, False, True, False]
    figure = layer_figure(selection, kept_mass(selection, scores))
    assert figure.data[2]["y"][3] is None
    assert figure.table.rows[3][-1] == "\N{EN DASH}"


def test_layer_figure_counts_experts() -> None:
    scores = make_scores()
    selection = select_from_scores(scores, SelectOptions(keep=0.6))
    figure = layer_figure(selection, kept_mass(selection, scores))
    kept, dropped, mass = figure.data
    assert kept["x"] == [str(layer) for layer in scores.layers]
    assert kept["y"] == [len(ids) for ids in selection.layers.values()]
    assert [a + b for a, b in zip(kept["y"], dropped["y"], strict=True)] == [12] * 5
    assert mass["y"] == pytest.approx([100 * share for share in selection.mass_kept.values()])
    assert f"between {min(kept['y'])} and {max(kept['y'])}" in figure.label


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.6])
def test_every_layer_is_kept_until_its_curve_reaches_alpha(keep: float) -> None:
    scores = make_scores(layers=8, experts=24)
    selection = select_from_scores(scores, SelectOptions(keep=keep))
    assert selection.alpha is not None
    curves = coverage_curves(scores)
    for row, ids in enumerate(selection.layers.values()):
        assert curves[row, len(ids)] >= selection.alpha - 1e-12
        assert curves[row, len(ids) - 1] < selection.alpha
    states = coverage_figure(scores, selection, kept_mass(selection, scores)).states
    for row, (layer, state) in enumerate(zip(scores.layers, states, strict=True)):
        assert state.name == str(layer)
        assert unpacked(state.data[1]["y"]) == pytest.approx(100 * curves[row], rel=1e-6)
        assert state.data[2]["x"] == [len(selection.layers[layer])]
        assert state.data[2]["y"] == pytest.approx([100 * curves[row, len(selection.layers[layer])]])


def test_coverage_curves_climb_from_nothing_to_all() -> None:
    scores = make_scores()
    curves = coverage_curves(scores)
    assert curves.shape == (5, 13)
    assert (curves[:, 0] == 0).all()
    assert curves[:, -1] == pytest.approx(1)
    assert (np.diff(curves) >= 0).all()
    assert (np.diff(curves, n=2) <= 1e-12).all()  # the best come first
    best = sorted((max(value, 0.0) for value in scores.values[0]), reverse=True)
    assert curves[0, 3] == pytest.approx(sum(best[:3]) / sum(best))


def test_experts_needed() -> None:
    curves = np.array([[0.0, 0.5, 0.8, 1.0], [0.0, 0.9, 0.95, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert experts_needed(curves, 0.5).tolist() == [1, 1, 3]
    assert experts_needed(curves, 0.9).tolist() == [3, 1, 3]


def test_the_background_shows_every_layer_and_both_ends() -> None:
    scores = make_scores(layers=3, experts=500)
    figure = coverage_figure(scores, None, None)
    x, y = (unpacked(figure.data[0][axis]) for axis in "xy")
    gaps = np.flatnonzero(np.isnan(x))
    assert len(gaps) == 3
    assert np.isnan(y[gaps]).all()
    first = slice(0, gaps[0])
    assert (x[first][0], x[first][-1]) == (0, 500)
    assert gaps[0] <= 130
    assert y[first] == pytest.approx(100 * coverage_curves(scores)[0][x[first].astype(int)], rel=1e-5)


@pytest.mark.parametrize("rule", ["uniform", "global"])
def test_without_alpha_there_is_no_line(rule: str) -> None:
    scores = make_scores()
    selection = select_from_scores(scores, SelectOptions(keep=0.5, method=Method(rule=rule)))
    assert "shapes" not in coverage_figure(scores, selection, kept_mass(selection, scores)).layout
    by_alpha = select_from_scores(scores, SelectOptions(keep=0.5))
    (line,) = coverage_figure(scores, by_alpha, kept_mass(by_alpha, scores)).layout["shapes"]
    assert line["y0"] == line["y1"] == pytest.approx(100 * by_alpha.alpha)


def test_heat_map_holds_kept_set_ranks_and_shares() -> None:
    scores = make_scores()
    selection = select_from_scores(scores, SelectOptions(keep=0.4))
    arrays = heat_map(scores, selection).arrays
    assert np.array_equal(unpacked(arrays["kept"]).astype(bool), selection.mask())
    assert unpacked(arrays["share"]) == pytest.approx(100 * shares(scores), rel=1e-6)
    assert unpacked(arrays["tokens"]) == pytest.approx(scores.activations)
    assert arrays["layers"] == list(scores.layers)
    ranks = unpacked(arrays["rank"])
    for row, values in enumerate(scores.values):
        order = sorted(range(12), key=lambda i: (-values[i], -scores.activations[row, i], i))
        assert [int(ranks[row, expert]) for expert in order] == list(range(12))


def test_brightness_grows_with_the_share() -> None:
    share = shares(make_scores(layers=6, experts=40))
    shade = brightness(share)
    assert shade.min() == 0
    assert shade.max() == 1
    flat = np.argsort(share, axis=None)
    assert (np.diff(shade.ravel()[flat]) >= 0).all()
    equal = brightness(np.full((2, 10), 0.1))
    assert ((equal > 0.3) & (equal < 0.7)).all()


def test_heat_map_without_values_or_without_a_selection() -> None:
    scores = make_scores()
    selection = select_from_scores(scores, SelectOptions(keep=0.4))
    kept_only = heat_map(None, selection)
    assert set(kept_only.arrays) == {"kept", "shade", "layers"}
    assert kept_only.states == ()
    assert kept_only.table is None
    values_only = heat_map(scores, None)
    assert unpacked(values_only.arrays["kept"]).all()
    assert [swatch.text for swatch in values_only.legend] == ["little to much value"]


def test_best_experts_are_the_best() -> None:
    scores = make_scores()
    selection = select_from_scores(scores, SelectOptions(keep=0.4))
    table = best_experts(scores, selection, shares(scores), layer_ranks(scores.values, scores.activations), count=2)
    for row, cells in enumerate(table.rows):
        order = np.argsort(-scores.values[row])
        assert cells[1].startswith(f"{order[0]} (")
        dropped = [i for i in order if i not in selection.layers[scores.layers[row]]]
        assert cells[2].startswith(f"{dropped[0]} (")
        assert int(cells[3]) == int((scores.activations[row] <= 0).sum())


def test_figures_agree_with_a_traced_selection() -> None:
    trace = routing_trace()
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    mass = kept_mass(selection, score_trace(trace, "shape"))
    assert mass == pytest.approx(list(selection.mass_kept.values()))


def test_numbers_as_text() -> None:
    assert [number(x) for x in (0, 0.16, 41, 1987, 2.5e-7, 123.4, -0.5)] == [
        *("0", "0.160", "41.0", "1,987", "2.50e-07", "123", "-0.500")
    ]
    assert percent(0.6) == "60.0\N{NO-BREAK SPACE}%"
    assert percent(None) == percent(float("nan")) == "\N{EN DASH}"
    assert plain("<b>&") == "&lt;b&gt;&amp;"
    assert shortened("a" * 40, 10) == "…" + "a" * 9
    assert smallest_integers(np.array([1]), 255).dtype == np.uint8
    assert smallest_integers(np.array([1]), 512).dtype == np.uint16
    assert unpacked(packed([1.5, float("nan")]))[0] == 1.5
