from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.scoring.scores import Scores
from shape_moe.selection.budget import Constraints, choose
from shape_moe.selection.method import Method
from shape_moe.selection.near_ties import HALF_PRECISION, ROUNDING, near_ties, priority_bounds, rounding_of
from shape_moe.selection.rules import get_rule, layer_ranks
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.selection.selection import load_selection
from support.data import synthetic_trace

LAYERS, EXPERTS = 3, 8
CONSTRAINTS = {
    "none": Constraints(),
    "a floor": Constraints(floor=3),
    "skipped and protected": Constraints(skip_layers=frozenset({1}), protect={0: (7,), 2: (0, 5)}),
    "multiples": Constraints(multiple_of=2, allow_rounding=True),
    "groups": Constraints(groups=2, allow_rounding=True),
    "equal": Constraints(equal=True, allow_rounding=True),
}


def scores_of(values: np.ndarray) -> Scores:
    return Scores("made up", tuple(range(len(values))), values, np.ones_like(values))


def kept_by(rule: str, values: np.ndarray, budget: int, constraints: Constraints) -> np.ndarray:
    scores = scores_of(values)
    ranks = layer_ranks(scores.values, scores.activations)
    return choose(get_rule(rule)(scores.values, scores.activations), budget, constraints, ranks=ranks)


def named(rule: str, values: np.ndarray, budget: int, constraints: Constraints, rounding: float) -> np.ndarray:
    scores, chosen = scores_of(values), get_rule(rule)
    mask = kept_by(rule, values, budget, constraints)
    return near_ties(chosen, scores, mask, constraints, priority_bounds(chosen, scores, rounding))


@pytest.mark.parametrize("rule", ["coverage", "uniform", "global"])
@pytest.mark.parametrize("constraints", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), budget=st.integers(14, 21), rounding=st.sampled_from([1e-3, 0.02, 0.1]))
def test_no_rounding_exchanges_an_expert_that_is_not_named(rule, constraints, seed, budget, rounding) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([0.0, 0.5, 1.0, 1.01, 2.0, 3.0], (LAYERS, EXPERTS)) * rng.uniform(0.98, 1.02, (LAYERS, 1))
    before = kept_by(rule, values, budget, constraints)
    near = named(rule, values, budget, constraints, rounding)
    for _ in range(40):
        moves = rng.choice([-1.0, 1.0], values.shape) if rng.random() < 0.5 else rng.uniform(-1, 1, values.shape)
        after = kept_by(rule, values * (1 + rounding * moves), budget, constraints)
        assert not ((before != after) & ~near).any()


def test_the_two_that_rounding_exchanges_are_named_and_no_others() -> None:
    values = np.array([[8.0, 4.0, 2.0, 1.0], [8.0, 4.0, 2.0 + 1e-6, 1.0]])
    near = named("global", values, 5, Constraints(), 1e-5)
    assert near.tolist() == [[False, False, True, False], [False, False, True, False]]
    assert not named("global", values, 4, Constraints(), 1e-5).any()  # 4 against 2: far apart
    assert not named("global", values, 5, Constraints(), 0.0).any()
    inside = named("coverage", np.array([[5.0, 3.0, 3.0, 1.0]]), 2, Constraints(), 1e-5)
    assert inside.tolist() == [[False, True, True, False]]


def test_layers_are_no_near_ties_under_a_rule_by_rank() -> None:
    """Equal ranks of different layers are told apart by the layer's number, which no rounding moves."""
    values = np.array([[4.0, 3.0, 2.0, 1.0]] * 3)
    assert not named("uniform", values, 7, Constraints(), 1e-3).any()
    assert named("uniform", np.array([[4.0, 2.0, 2.0, 1.0]] * 2), 4, Constraints(), 1e-3).sum() == 4


def test_protected_experts_and_skipped_layers_are_never_named() -> None:
    near = named("global", np.ones((3, 8)), 14, CONSTRAINTS["skipped and protected"], 1e-3)
    assert not near[1].any()
    assert not near[0, 7]
    assert not near[2, [0, 5]].any()
    assert near.sum() == 24 - 8 - 3


def test_bounds_hold_every_priority_that_rounding_gives() -> None:
    rng = np.random.default_rng(3)
    values = rng.uniform(0, 1, (LAYERS, EXPERTS)) ** 3
    for rule in map(get_rule, ("coverage", "uniform", "global")):
        first, last = priority_bounds(rule, scores_of(values), 0.05)
        for _ in range(300):
            moved = rule(values * (1 + 0.05 * rng.choice([-1, 1], values.shape)), np.ones_like(values))
            assert (first <= moved).all()
            assert (moved <= last).all()


def test_the_bound_follows_the_dtype_of_the_trace() -> None:
    assert rounding_of("float32") == ROUNDING["float32"] == 2e-5
    assert rounding_of("bfloat16") == rounding_of("float16") == HALF_PRECISION == 1e-4


def test_a_selection_names_its_near_ties_and_keeps_them_in_its_file(tmp_path) -> None:
    trace = synthetic_trace()
    trace.statistics["gate"][:] = np.arange(8) + np.arange(3)[:, None, None, None, None] * 0.25 + 1.0
    trace.statistics["gate"][0, ..., 3] = trace.statistics["gate"][0, ..., 4] * (1 + 1e-7)
    chosen = TraceSelector(trace).select(SelectOptions(0.5, Method("gating", "uniform")))
    assert chosen.layers[0] == [3, 5, 6, 7]
    assert chosen.near_ties == {0: [3, 4]}
    chosen.save(tmp_path / "s.json")
    assert load_selection(tmp_path / "s.json") == chosen
    assert TraceSelector(trace).select(SelectOptions(0.5, Method("random", "uniform"))).near_ties == {}
