"""Contribution values are exact Shapley values, and the Gram matrix prices whole sets."""

from __future__ import annotations

import numpy as np
import pytest
import shapiq
import torch

from shape_moe.calibration.batches import batches, make_batch
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.scoring.scores import score_trace
from shape_moe.tracing.token_weights import SegmentWeights
from support import brute_force
from support.data import make_examples, trace_model
from support.naive_trace import capture, expert_output
from support.tiny_models import make_model, moe_block


def contributions(model, examples, layer: int):
    """Per token: ids, contributions [k, H] and the residual stream, in float64."""
    experts = moe_block(model.model.layers[layer]).experts
    for batch in batches(examples, 6, 0):
        captured = capture(model, batch)[layer]
        for token, segment in enumerate(batch.segments.tolist()):
            if segment >= 0:
                ids = captured.ids[token].tolist()
                outputs = [expert_output(experts, i, captured.hidden[token]) for i in ids]
                a = torch.stack([g * o for g, o in zip(captured.gates[token].double(), outputs, strict=True)])
                yield ids, a.detach().numpy(), captured.residual[token].detach().numpy()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_values_equal_shapley_values_over_all_subsets(name: str) -> None:
    model = make_model(name)
    examples = make_examples(5)
    trace = trace_model(model, examples)
    experts, alike = trace.info.num_experts, ScoreOptions(SegmentWeights())
    for row, layer in enumerate(trace.info.layers):
        raw, relative = np.zeros(experts), np.zeros(experts)
        for ids, a, h in contributions(model, examples, layer):
            y = a.sum(axis=0)
            worth = lambda s, a=a, y=y: y @ y - np.square(y - a[sorted(s)].sum(axis=0)).sum()  # noqa: E731
            values = brute_force.shapley_values(worth, len(ids))
            raw[ids] += values
            relative[ids] += values / (h @ h)
        scale = np.abs(raw).max()
        np.testing.assert_allclose(
            score_trace(trace, "contribution-raw", alike).values[row], raw, rtol=1e-4, atol=1e-5 * scale
        )
        scale = np.abs(relative).max()
        np.testing.assert_allclose(
            score_trace(trace, "contribution", alike).values[row], relative, rtol=1e-4, atol=1e-5 * scale
        )


def test_closed_form_equals_shapiq() -> None:
    a = np.random.default_rng(0).normal(size=(6, 20))
    y = a.sum(axis=0)

    def game(coalitions: np.ndarray) -> np.ndarray:
        return np.array([y @ y - np.square(y - a[row.astype(bool)].sum(axis=0)).sum() for row in coalitions])

    exact = shapiq.ExactComputer(game, n_players=6)("SV", order=1)
    values = [exact[(i,)] for i in range(6)]
    np.testing.assert_allclose(a @ y, values, rtol=1e-10)


def test_gram_prices_any_set_of_dropped_experts() -> None:
    model = make_model("olmoe")
    examples = make_examples(8)
    trace = trace_model(model, examples)
    rng = np.random.default_rng(0)
    for layer in (0, 2):
        gram = trace.sums("gram_relative")[trace.info.layers.index(layer)]
        block = moe_block(model.model.layers[layer])
        for size in (1, 4, 9):
            dropped = rng.choice(16, size, replace=False)
            change = 0.0
            for batch in batches(examples, 4, 0):
                captured = capture(model, batch)[layer]
                keep = torch.from_numpy(~np.isin(captured.ids.numpy(), dropped))
                with torch.no_grad():
                    whole = block.experts(captured.hidden, captured.ids, captured.gates)
                    part = block.experts(captured.hidden, captured.ids, captured.gates * keep)
                real = batch.segments >= 0
                changes, streams = (whole - part)[real].double(), captured.residual[real].double()
                change += float((changes.square().sum(1) / streams.square().sum(1)).sum())
            assert gram[np.ix_(dropped, dropped)].sum() == pytest.approx(change, rel=1e-5)


def test_values_add_up_to_the_output() -> None:
    """Efficiency: over all experts, values sum to the squared norm of the routed output."""
    model = make_model("deepseek_v2")
    trace = trace_model(model, make_examples(6))
    values = score_trace(trace, "contribution-raw", ScoreOptions(SegmentWeights())).values
    np.testing.assert_allclose(values.sum(axis=1), trace.sums("output_square"), rtol=1e-5)


def test_one_batch_of_padding_only_changes_nothing() -> None:
    model = make_model("qwen3_moe")
    short, long = make_examples(2, longest=3)[0], make_examples(1, longest=14, seed=9)[0]
    alone = trace_model(model, [short], batch_size=1)
    batch = make_batch([short, long], [0, 1], 0)
    assert batch.input_ids.shape[1] > len(short.tokens)
    together = trace_model(model, [short, long], batch_size=2)
    other = trace_model(model, [long], batch_size=1)
    name = "gram_relative"
    np.testing.assert_allclose(together.sums(name), alone.sums(name) + other.sums(name), rtol=1e-4, atol=1e-6)
