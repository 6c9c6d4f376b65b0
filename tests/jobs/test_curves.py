"""How much of the grid and of the examples is measured within a budget, and how long it is said to take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.architectures.sites import decoder_layers
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.jobs import curves
from shape_moe.jobs.curves import LEAST_COUNTS, MOST_TOKENS, CurveMaker, extent_within
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.progress import SILENT
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.layer_curves import counts_to_measure
from shape_moe.selection.method import Method
from support.data import write_lines

METHOD = Method("replacement", "measured")


@given(
    passes=st.floats(1, 300),
    counts=st.integers(3, 12),
    layers=st.floats(0.5, 60),
    tokens=st.integers(500, 200_000),
)
def test_a_budget_is_kept_and_used(passes: float, counts: int, layers: float, tokens: int) -> None:
    found = extent_within(passes, counts, layers, tokens)
    cost = found.counts * layers * found.tokens / tokens
    assert cost <= passes or found.tokens == 1
    assert min(counts, LEAST_COUNTS) <= found.counts <= counts
    assert 1 <= found.tokens <= min(tokens, MOST_TOKENS)
    whole = extent_within(None, counts, layers, tokens)
    assert (whole.counts, whole.tokens) == (counts, min(tokens, MOST_TOKENS))
    if counts * layers * whole.tokens / tokens <= passes:
        assert found == whole


@pytest.mark.parametrize(
    ("passes", "tokens", "expected"),
    [
        (100, 3000, (11, 3000)),  # 11 counts x 2.5 passes
        (20, 3000, (8, 3000)),  # fewer counts first
        (12, 3000, (6, 2400)),  # then fewer tokens
        (10, 3000, (5, 2048)),
        (8, 8192, (6, 4369)),
        (0.75, 8192, (3, 819)),  # then fewer of both
    ],
)
def test_counts_go_first_then_tokens(passes: float, tokens: int, expected: tuple[int, int]) -> None:
    found = extent_within(passes, 11, 2.5, tokens)
    assert (found.counts, found.tokens) == expected


def test_a_smaller_grid_spans_the_whole_one() -> None:
    assert counts_to_measure(32, 1, most=6) == (1, 4, 8, 12, 20, 28)
    assert counts_to_measure(32, 4, most=3) == (4, 12, 28)
    assert counts_to_measure(32, 4, most=20) == counts_to_measure(32, 4)


@pytest.fixture(scope="module")
def maker(embedded, tmp_path_factory):
    file = write_lines(tmp_path_factory.mktemp("data") / "d.jsonl", examples("sorting", 24, seed=1))
    options = ExampleOptions(DataOptions(str(file), samples=24), device="cpu", dtype="float32")
    session = ModelSession.open(embedded, options, None, SILENT)
    trace = session.run(None)

    def make(folder=None, passes=None) -> CurveMaker:
        return CurveMaker(session, session.calibrator, trace, ScoreOptions(), SILENT, passes=passes, folder=folder)

    return make


def test_what_is_measured_costs_what_was_said(maker) -> None:
    within = maker(passes=6)
    assert within.passes(METHOD) <= 6 + 1  # and the dense pass
    assert len(within.of(METHOD).counts) == 3
    assert within.passes(METHOD) == 0
    assert within.seconds(METHOD) == 0
    assert maker().passes(METHOD) == pytest.approx(1 + 11 * (4 + 3 + 2 + 1) / 4)


def test_curves_are_found_again_and_serve_everyone(maker, tmp_path, monkeypatch) -> None:
    first = maker(tmp_path, passes=4).of(METHOD)
    monkeypatch.setattr(CurveMaker, "measured", lambda *_: pytest.fail("measured again"))
    assert maker(tmp_path, passes=4).of(METHOD) == first


def test_the_estimate_is_right_within_a_factor_of_two(maker, monkeypatch) -> None:
    """Time is what decoder layers take here, so that no other load of the machine counts."""
    few, ran = maker(passes=8), [0]
    hooks = [
        layer.register_forward_pre_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
        for layer in decoder_layers(few.session.model).values()
    ]
    monkeypatch.setattr(curves, "clock", lambda: float(ran[0]))
    said, began = few.seconds(METHOD), ran[0]
    few.of(METHOD)
    took = ran[0] - began
    for hook in hooks:
        hook.remove()
    assert took > 20
    assert took / 2 < said < took * 2
