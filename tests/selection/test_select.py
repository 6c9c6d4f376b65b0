"""From a trace to a selection: budgets, alpha, stability, warnings, and the file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import shape_moe
from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.errors import BudgetError, CheckpointError, UsageError
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.scoring.shape import shape_values
from shape_moe.selection.budget import choose
from shape_moe.selection.guards import super_experts, warn_unstable
from shape_moe.selection.method import Method
from shape_moe.selection.rules import bisection_budget, coverage_priority
from shape_moe.selection.select import SelectOptions, check_feasible, select_from_scores, select_from_trace
from shape_moe.selection.stability import stability
from shape_moe.tracing.token_weights import SegmentWeights
from support.data import synthetic_trace


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(layers=4, experts=16, top_k=3, tokens=800)


@pytest.mark.parametrize("rule", ["coverage", "uniform", "global"])
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.3])
def test_budgets_are_exact_under_every_rule(trace, rule, keep) -> None:
    selection = select_from_trace(trace, SelectOptions(keep=keep, method=Method(rule=rule)))
    assert selection.kept == int(keep * 64 + 0.5)
    assert selection.keep == selection.kept / 64
    assert selection.fingerprint == trace.info.fingerprint
    if rule == "uniform":
        counts = [len(ids) for ids in selection.layers.values()]
        assert max(counts) - min(counts) <= 1


def test_alpha_describes_the_selection(trace) -> None:
    scores = score_trace(trace)
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    tau = coverage_priority(scores.values, scores.activations)
    assert np.array_equal(tau < selection.alpha, selection.mask())
    assert select_from_trace(trace, SelectOptions(keep=0.5, method=Method(rule="uniform"))).alpha is None
    forced = SelectOptions(keep=0.5, protect={0: (int(np.argmin(scores.values[0])),)})
    assert select_from_trace(trace, forced).alpha is None  # no alpha keeps the worst expert of a layer alone


def test_alpha_is_null_when_tied() -> None:
    scores = Scores("table", (0, 1), np.ones((2, 4)), np.ones((2, 4)))
    assert select_from_scores(scores, SelectOptions(keep=0.375)).alpha is None
    assert select_from_scores(scores, SelectOptions(keep=0.5)).alpha == 0.5
    assert select_from_scores(scores, SelectOptions(keep=1)).alpha is None


def test_kept_mass_is_the_share_of_positive_scores() -> None:
    values = np.array([[4.0, 3.0, 2.0, -5.0], [0.0, 0.0, 0.0, 0.0]])
    selection = select_from_scores(Scores("table", (3, 7), values, np.ones((2, 4))), SelectOptions(keep=0.5))
    assert selection.layers == {3: [0, 1], 7: [0, 1]}
    assert selection.mass_kept == {3: pytest.approx(7 / 9), 7: None}


def test_stability_compares_halves(trace) -> None:
    selection = select_from_trace(trace, SelectOptions(keep=0.5))
    masks = [select_from_trace(trace.half(h), SelectOptions(keep=0.5)).mask() for h in (0, 1)]
    assert selection.stability == stability(*masks)
    shared = (masks[0] & masks[1]).sum()
    assert selection.stability == {"agreement": shared / 32, "undecided": 32 - shared}
    assert stability(masks[0], masks[0]) == {"agreement": 1.0, "undecided": 0.0}


def test_halves_choose_at_the_budget_of_the_whole() -> None:
    """The paper's bisection ends at another budget for each of them."""
    trace = synthetic_trace(layers=4, experts=16, top_k=3, tokens=300)
    options = SelectOptions(keep=0.5, tolerance=0.15)
    selection = select_from_trace(trace, options)
    scored = [score_trace(trace.half(half)) for half in (0, 1)]
    priorities = [coverage_priority(half.values, half.activations) for half in scored]
    own = [bisection_budget(priority, 0.5, 0.15) for priority in priorities]
    assert set(own) != {selection.kept}  # else this would show nothing
    masks = [choose(priority, selection.kept) for priority in priorities]
    assert [int(mask.sum()) for mask in masks] == [selection.kept] * 2
    assert selection.stability == stability(*masks)


def test_one_example_has_no_halves() -> None:
    trace = synthetic_trace(tokens=50)
    only_even = replace(trace, statistics={**trace.statistics, "tokens": trace.statistics["tokens"].copy()})
    only_even.statistics["tokens"][:, :, :, 1::2] = 0
    assert select_from_trace(only_even, SelectOptions(keep=0.5)).stability is None


def test_unstable_selections_are_warned_about() -> None:
    assert "agree on only 80 %" in warn_unstable({"agreement": 0.8, "undecided": 3.0})[0]
    assert warn_unstable({"agreement": 0.95, "undecided": 3.0}) == []
    assert warn_unstable(None) == []


def test_lost_super_experts_are_warned_about(trace) -> None:
    norms = trace.statistics["largest_norm"].copy()
    worst = int(np.argmin(score_trace(trace).values[2]))
    norms[2, 0, 0, 0, worst] = 500.0
    loud = replace(trace, statistics={**trace.statistics, "largest_norm": norms})
    selection = select_from_trace(loud, SelectOptions(keep=0.5))
    assert any(f"layer 2 expert {worst}" in w and f"--protect 2:{worst}" in w for w in selection.warnings)
    kept = select_from_trace(loud, SelectOptions(keep=0.5, protect={2: (worst,)}))
    assert not any("outlier" in warning for warning in kept.warnings)


def test_super_experts_stand_out_of_their_layer() -> None:
    norms = np.array([[1.0, 2.0, 1.5, 100.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert super_experts(norms).tolist() == [[False, False, False, True, False], [False] * 5]


def test_unseen_experts_are_warned_about() -> None:
    few = synthetic_trace(experts=32, tokens=6)
    assert any("never routed to in calibration" in w for w in select_from_trace(few, SelectOptions(keep=0.5)).warnings)


def test_inflated_gate_weights_are_warned_about(trace) -> None:
    raw = replace(trace, info=replace(trace.info, routing=RouterFacts(3, 3, 1, renormalises=False)))
    reroute = SelectOptions(keep=0.5, method=Method(routing="reroute"))
    assert any("does not renormalise" in w for w in select_from_trace(raw, reroute).warnings)
    assert not any("renormalise" in w for w in select_from_trace(raw, SelectOptions(keep=0.5)).warnings)
    assert not any("renormalise" in w for w in select_from_trace(trace, reroute).warnings)


def test_rerouting_keeps_enough_for_the_top_k(trace) -> None:
    low = SelectOptions(keep=0.2, method=Method(routing="reroute"))
    assert min(len(ids) for ids in select_from_trace(trace, low).layers.values()) == 3
    with pytest.raises(BudgetError, match="floor of 3"):
        select_from_trace(trace, SelectOptions(keep=0.1, method=Method(routing="reroute")))
    dropped = select_from_trace(trace, SelectOptions(keep=0.1))
    assert min(len(ids) for ids in dropped.layers.values()) >= 1


def test_router_groups_come_from_the_trace(trace) -> None:
    grouped = replace(trace, info=replace(trace.info, routing=RouterFacts(3, 8, groups=4, renormalises=True)))
    selection = select_from_trace(grouped, SelectOptions(keep=0.625, method=Method(routing="reroute")))
    for ids in selection.layers.values():
        assert len({sum(i // 4 == g for i in ids) for g in range(4)}) == 1
    free = select_from_trace(grouped, SelectOptions(keep=0.625))
    assert any(len({sum(i // 4 == g for i in ids) for g in range(4)}) > 1 for ids in free.layers.values())


def test_feasibility_is_known_beforehand() -> None:
    routing = RouterFacts(4, 4)
    check_feasible(SelectOptions(keep=0.5), (0, 1), 16, routing)
    with pytest.raises(BudgetError, match="equal counts"):
        check_feasible(SelectOptions(keep=0.6, method=Method(routing="reroute", target="stock")), (0, 1), 16, routing)
    with pytest.raises(UsageError, match="Layer 5 is not an MoE layer"):
        check_feasible(SelectOptions(keep=0.5, skip_layers=(5,)), (0, 1), 16, routing)


def test_tables_need_the_top_k_to_reroute() -> None:
    scores = Scores("table", (0,), np.arange(8.0)[None], np.ones((1, 8)))
    with pytest.raises(UsageError, match="give --top-k"):
        select_from_scores(scores, SelectOptions(keep=0.5, method=Method(routing="reroute")))
    chosen = select_from_scores(
        scores, SelectOptions(keep=0.5, method=Method(routing="reroute")), routing=RouterFacts(2, 2)
    )
    assert (chosen.layers, chosen.top_k) == ({0: [4, 5, 6, 7]}, 2)


def test_a_segment_that_counts_alone_decides_alone(trace) -> None:
    """As a table of values from its tokens, which is another selection than that of all tokens."""
    only = ScoreOptions(SegmentWeights(prompt=0, response=1))
    tables = [trace.coalitions[layer] for layer in trace.info.layers]
    values = np.stack([shape_values(table.members, table.counts[:, 1], 16) for table in tables])
    activations = trace.statistics["tokens"][:, 0, 2:].sum(axis=(1, 2)).astype(float)
    expected = select_from_scores(Scores("shape", trace.info.layers, values, activations), SelectOptions(keep=0.5))
    assert select_from_trace(trace, SelectOptions(keep=0.5, scoring=only)).layers == expected.layers
    assert select_from_trace(trace, SelectOptions(keep=0.5)).layers != expected.layers


def test_round_trip(trace, tmp_path) -> None:
    options = SelectOptions(keep=0.5, protect={1: (2, 3)}, skip_layers=(0,), multiple_of=2)
    selection = select_from_trace(trace, options)
    selection.save(tmp_path / "s.json")
    assert shape_moe.load_selection(tmp_path / "s.json") == selection
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["format_version"] == 2
    assert document["keep_met"] == 0.5
    assert document["constraints"]["protect"] == {"1": [2, 3]}
    assert all(ids == sorted(ids) for ids in document["layers"].values())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format_version": 9}, "another format version"),
        ({"layers": {"0": [1, 0]}}, "ascending"),
        ({"layers": {"0": [0, 99]}}, "between 0 and 15"),
        ({"layers": {"0": []}}, "keeps no expert"),
        ({"layers": {}}, "no layers"),
        ({"layers": {"x": [0]}}, "not a valid selection"),
        ({"routing": "reroute", "layers": {"0": [1, 2]}}, "fewer than the 3"),
        ({"routing": "teleport"}, "teleport"),
        ({"layers": {"0": [0.5, 1]}}, "Expected int, got float"),
        ({"layers": {"0": [0.0, 1]}}, "Expected int, got float"),
        ({"layers": {"0": ["0", 1]}}, "Expected int, got str"),
        ({"layers": {"0": [True, 2]}}, "Expected int, got bool"),
        ({"layers": {"0": [None]}}, "Expected int, got null"),
        ({"layers": {"0": "01"}}, "Expected array, got str"),
        ({"layers": {"0": [-1, 1]}}, "between 0 and 15"),
        ({"layers": {"0": [1, 1]}}, "different ids"),
        ({"layers": {"0": [0, 16]}}, "between 0 and 15"),
        ({"layers": {"-1": [0]}}, "must not be negative"),
        ({"layers": [[0]]}, "Expected object, got array"),
        ({"num_experts": 2_000_000_000}, "between 1 and 32,767"),
        ({"num_experts": "16"}, "Expected int, got str"),
        ({"num_experts": [16]}, "Expected int, got array"),
        ({"top_k": 2.5}, "Expected int . null, got float"),
        ({"top_k": 17}, "cannot be served by 17 of 16"),
        ({"warnings": "text"}, "Expected array, got str"),
        ({"mass_kept": {"0": "all"}}, "Expected float . null, got str"),
        ({"mass_kept": {"0": float("nan")}}, "not a finite number"),
        ({"keep_asked": float("inf")}, "not a finite number"),
        ({"scorer": 7}, "Expected str, got int"),
        ({"constraints": [1]}, "Expected object, got array"),
        ({"stability": {"agreement": "high"}}, "Expected float, got str"),
        ({"surprise": 1}, "not a valid selection"),
    ],
)
def test_damaged_selections_are_refused(trace, tmp_path, change, word) -> None:
    document = select_from_trace(trace, SelectOptions(keep=0.5)).to_document()
    (tmp_path / "s.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(CheckpointError, match=word):
        shape_moe.load_selection(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"keep": 0}, "above 0"),
        ({"keep": 0.5, "method": Method(rule="best")}, "no rule"),
        ({"keep": 0.5, "method": Method(target="square")}, "ragged or stock"),
        ({"keep": 0.5, "method": Method(target="stock")}, "needs routing reroute"),
        ({"keep": 0.5, "tolerance": 0.01, "method": Method(rule="global")}, "goes with the coverage rule"),
        ({"keep": 0.5, "tolerance": 2}, "between 0 and 1"),
    ],
)
def test_contradicting_options_are_refused(options, word) -> None:
    with pytest.raises(UsageError, match=word):
        SelectOptions(**options)


def test_segments_without_tokens_cannot_decide() -> None:
    prompts = synthetic_trace(layers=2, experts=8, top_k=2, tokens=100)
    silent = replace(
        prompts,
        statistics={
            name: values * (np.arange(4) < 2)[(None, None, slice(None)) + (None,) * (values.ndim - 3)]
            for name, values in prompts.statistics.items()
        },
    )
    only = ScoreOptions(SegmentWeights(prompt=0, response=1))
    with pytest.raises(UsageError, match="none of them count with --prompt-weight 0 and --response-weight 1"):
        select_from_trace(silent, SelectOptions(keep=0.5, scoring=only))


def test_random_values_have_no_stability(trace) -> None:
    assert select_from_trace(trace, SelectOptions(keep=0.5, method=Method("random"))).stability is None
