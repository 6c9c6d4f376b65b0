"""Coalition figures against counting token by token."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from shape_moe.reporting.figures.co_activation import (
    CHANCE,
    NEVER,
    TOO_FEW,
    Meetings,
    expected_together,
    experts_lost,
    lift_codes,
    lost_shares,
    neighbours,
    strongest_pairs,
    tokens_together,
)
from shape_moe.reporting.figures.coalitions import (
    MOST_SHOWN,
    co_activations,
    lost_figure,
    matrix_figure,
    pairs_figure,
)
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.tracing.coalitions import tabulate
from shape_moe.tracing.token_weights import SegmentWeights
from support.data import routing_trace
from support.figures import unpacked

EVEN = SegmentWeights()


def tokens(seed: int = 0, count: int = 300, experts: int = 9, top_k: int = 3):
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.ones(experts))
    members = np.array([rng.choice(experts, top_k, replace=False, p=popularity) for _ in range(count)])
    return members, rng.integers(0, 2, count), rng.integers(0, 8, count)


@pytest.mark.parametrize("weights", [EVEN, SegmentWeights(0.5, 2.0), SegmentWeights(0.0, 1.0)])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_tokens_together_are_counted(weights: SegmentWeights, top_k: int) -> None:
    members, segments, folds = tokens(top_k=top_k)
    together = tokens_together(tabulate(members, segments, folds), 9, weights)
    counted = np.zeros((9, 9))
    for coalition, segment in zip(members, segments, strict=True):
        weight = (weights.prompt, weights.response)[segment]
        for i in coalition:
            for j in coalition:
                counted[i, j] += weight
    assert together == pytest.approx(counted)


def test_expectation_keeps_the_number_of_meetings_and_follows_traffic() -> None:
    together = tokens_together(tabulate(*tokens()), 9, EVEN)
    expected = expected_together(together)
    alone = np.diag(together)
    assert expected.sum() == pytest.approx(together.sum() - alone.sum())
    ratios = [expected[i, j] / (alone[i] * alone[j]) for i, j in combinations(range(9), 2) if alone[i] * alone[j]]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert not expected_together(np.zeros((3, 3))).any()


def test_strongest_pairs_are_the_clearest() -> None:
    together = tokens_together(tabulate(*tokens()), 9, EVEN)
    expected = expected_together(together)
    surprise = {
        (i, j): (together[i, j] - expected[i, j]) / max(expected[i, j], 1) ** 0.5 for i, j in combinations(range(9), 2)
    }
    best = sorted((pair for pair, z in surprise.items() if z > 0), key=lambda pair: -surprise[pair])[:5]
    found = strongest_pairs(Meetings(together), 5)
    assert [(pair.first, pair.second) for pair in found] == best
    assert [pair.tokens for pair in found] == [together[pair] for pair in best]
    assert [pair.expected for pair in found] == pytest.approx([expected[pair] for pair in best])


def test_lift_survives_its_one_byte() -> None:
    together = tokens_together(tabulate(*tokens(count=4000)), 9, EVEN)
    expected = expected_together(together)
    shown = np.array([8, 3, 5, 0, 1])
    codes = iter(lift_codes(Meetings(together), shown))
    for i, j in combinations(shown, 2):
        code = int(next(codes))
        if expected[i, j] < 5 and together[i, j] < 5:
            assert code == TOO_FEW
        elif together[i, j] == 0:
            assert code == NEVER
        else:
            assert 2 ** ((code - CHANCE) / 20) == pytest.approx(together[i, j] / expected[i, j], rel=0.02)


def test_lift_codes_name_the_special_cases() -> None:
    together = np.array([[100.0, 0.0, 50.0, 1], [0.0, 100.0, 50.0, 0], [50.0, 50.0, 200.0, 1], [1, 0, 1, 2]])
    codes = lift_codes(Meetings(together), np.arange(4))
    pairs = dict(zip(combinations(range(4), 2), codes.tolist(), strict=True))
    assert pairs[0, 1] == NEVER
    assert pairs[0, 3] == pairs[1, 3] == TOO_FEW
    assert pairs[0, 2] > CHANCE


def test_neighbours_find_blocks() -> None:
    members = np.array([[0, 4], [2, 5], [1, 3]] * 50 + [[4, 2], [5, 1]])
    together = tokens_together(tabulate(members, np.zeros(152, int), np.zeros(152, int)), 8, EVEN)
    order = neighbours(Meetings(together), np.array([0, 1, 2, 3, 6, 4, 5, 7])).tolist()
    assert sorted(order) == list(range(8))
    assert order[-2:] == [6, 7]
    assert all(abs(order.index(a) - order.index(b)) == 1 for a, b in ((0, 4), (2, 5), (1, 3)))


def test_experts_lost_are_counted() -> None:
    members, segments, folds = tokens(top_k=4)
    kept = np.array([True, False, True, True, False, True, False, True, True])
    weights = SegmentWeights(1.0, 3.0)
    counted: Counter[int] = Counter()
    for coalition, segment in zip(members, segments, strict=True):
        counted[sum(not kept[i] for i in coalition)] += (1, 3)[segment]
    lost = experts_lost(tabulate(members, segments, folds), kept, weights)
    whole = sum(counted.values())
    assert lost == pytest.approx([counted[n] / whole for n in range(5)])
    empty = tabulate(members[:0], segments[:0], folds[:0])
    assert not experts_lost(empty, kept, weights).any()


@pytest.mark.parametrize("top_k", [2, 4, 7])
def test_lost_figure_adds_up(top_k: int) -> None:
    trace = routing_trace(top_k=top_k)
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    figure = lost_figure(trace.info.layers, lost_shares(trace, selection, EVEN))
    columns = np.stack([unpacked(trace_["y"]) for trace_ in figure.data])
    assert columns.sum(axis=0) == pytest.approx(100, rel=1e-5)
    mask = dict(zip(selection.layers, selection.mask(), strict=True))
    for row, layer in enumerate(trace.info.layers):
        lost = experts_lost(trace.coalitions[layer], mask[layer], EVEN)
        assert columns[0, row] == pytest.approx(100 * lost[0], abs=1e-3)
        assert float(figure.table.rows[row][-1]) == pytest.approx(lost @ np.arange(top_k + 1), abs=0.0051)
    assert len(figure.data) == min(4, top_k) + 1
    assert figure.data[-1]["name"] == ("4 or more lost" if top_k > 4 else f"{top_k} lost")


def test_matrix_shows_kept_experts_first() -> None:
    trace = routing_trace()
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    figure = matrix_figure(co_activations(trace, EVEN), selection)
    for layer, state in zip(trace.info.layers, figure.states, strict=True):
        ids = unpacked(state.arrays["ids"]).tolist()
        kept = set(selection.layers[layer])
        assert sorted(ids) == list(range(16))
        assert set(ids[: len(kept)]) == kept
        assert [shape["x0"] for shape in state.layout["shapes"]] == [len(kept) - 0.5, -0.5]
        assert len(unpacked(state.arrays["codes"])) == 16 * 15 // 2


def test_of_many_experts_the_busiest_are_shown() -> None:
    trace = routing_trace(layers=1, experts=MOST_SHOWN + 40, tokens=3000)
    (state,) = matrix_figure(co_activations(trace, EVEN), None).states
    ids = unpacked(state.arrays["ids"])
    busy = trace.sums("tokens")[0]
    assert len(set(ids.tolist())) == MOST_SHOWN
    assert busy[ids].min() >= np.sort(busy)[-MOST_SHOWN]
    assert f"The {MOST_SHOWN} busiest are shown" in state.label


def test_pairs_figure_names_pairs_and_what_becomes_of_them() -> None:
    trace = routing_trace()
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    layers = co_activations(trace, EVEN)
    figure = pairs_figure(layers, selection)
    for layer, state in zip(trace.info.layers, figure.states, strict=True):
        kept = selection.layers[layer]
        both, one, none, expected = state.data
        for place, name in enumerate(both["y"]):
            i, j = (int(part) for part in name.split(" + "))
            by_status = [none, one, both]
            for count, column in enumerate(by_status):
                wanted = layers[layer].together[i, j] if count == (i in kept) + (j in kept) else None
                assert column["x"][place] == wanted
            assert expected["x"][place] == pytest.approx(expected_together(layers[layer].together)[i, j])
    assert len(pairs_figure(layers, None).data) == 2


def test_a_layer_without_coalitions_says_so() -> None:
    trace = routing_trace(layers=2)
    layers = {0: co_activations(trace, EVEN)[0], 1: Meetings(np.zeros((16, 16)))}
    assert "no pair" in pairs_figure(layers, None).states[1].lines[0]
    codes = unpacked(matrix_figure(layers, None).states[1].arrays["codes"])
    assert (codes == TOO_FEW).all()
