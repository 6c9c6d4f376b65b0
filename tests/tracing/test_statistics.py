"""Traced statistics against a naive float64 computation, for every family."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from shape_moe.architectures.moe_config import read_moe_config
from shape_moe.calibration.batches import batches
from shape_moe.tracing.observed import one_minus_cosine
from shape_moe.tracing.transformers_model import ModelTracer
from support.data import make_examples
from support.naive_trace import naive_statistics
from support.tiny_models import make_model

RELATIVE = 1e-5


def compare(traced: dict, naive: dict, layers: tuple[int, ...]) -> None:
    for row, layer in enumerate(layers):
        for name, expected in naive[layer].items():
            if name.endswith("_size"):
                continue
            (found,) = traced[name][row]  # there are no classes
            if name.startswith("gram"):
                # errors of inner products are relative to the vectors, which may be nearly orthogonal
                scale = np.sqrt(np.einsum("shii->shi", expected))
                bound = RELATIVE * (scale[..., :, None] * scale[..., None, :]).clip(min=1e-30)
                assert (np.abs(found - expected) <= bound).all(), (layer, name)
            elif name.startswith("contribution"):
                bound = RELATIVE * naive[layer][f"{name}_size"]
                assert (np.abs(found - expected) <= bound).all(), (layer, name)
            else:
                np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=0, err_msg=f"layer {layer} {name}")


def as_counter(table) -> Counter:
    """Tokens by coalition, cell and half."""
    counter: Counter = Counter()
    for half in (0, 1):
        part = table.half(half)
        for members, counts in zip(part.members, part.by_cell(), strict=True):
            for cell, count in enumerate(counts.tolist()):
                counter[tuple(members.tolist()), cell, half] += count
    return +counter


def test_every_statistic_equals_the_naive_one(family: str) -> None:
    model = make_model(family)
    todo = list(batches(make_examples(11), 4, 0))
    moe = read_moe_config(model.config.to_dict())
    naive, coalitions = naive_statistics(model, todo, moe.num_experts, moe.family.router_scores == "sigmoid")
    tracer = ModelTracer(model)
    tracer.run(todo)
    compare(tracer.statistics(), naive, tracer.layers)
    for layer, table in tracer.coalitions().items():
        assert as_counter(table) == +coalitions[layer]


def test_bfloat16_statistics_are_those_of_the_outputs_it_computed() -> None:
    """In bfloat16 only the experts' outputs are rounded; what is derived from them is not."""
    model = make_model("qwen3_moe", dtype=torch.bfloat16)
    todo = list(batches(make_examples(6), 6, 0))
    naive, _ = naive_statistics(model, todo, 16, sigmoid=False)
    tracer = ModelTracer(model)
    tracer.run(todo)
    traced = tracer.statistics()
    for row, layer in enumerate(tracer.layers):
        for name in ("tokens", "gate", "gate_renormalised", "layer_tokens"):
            np.testing.assert_allclose(traced[name][row, 0], naive[layer][name], rtol=1e-6)
        for name in ("norm", "gated_norm", "output_square", "gated_norm_turned"):
            np.testing.assert_allclose(traced[name][row, 0], naive[layer][name], rtol=0.02)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_batching_does_not_change_counts(batch_size: int) -> None:
    """Float32 counts differ between batch sizes only for tokens whose k-th and next router score nearly tie."""
    model = make_model("olmoe")
    examples = make_examples(20, seed=3)
    gaps = []
    for site in model.model.layers:
        site.mlp.gate.register_forward_hook(
            lambda _m, _i, out: gaps.append(out[0].softmax(-1).sort(-1, descending=True).values)
        )
    tracers = []
    for size in (7, batch_size):
        tracer = ModelTracer(model)
        tracer.run(batches(examples, size, 0))
        tracers.append(tracer)
    nearest = min(float((scores[:, 3] - scores[:, 4]).min()) for scores in gaps)
    assert nearest > 1e-6, "the test's tokens must not be tied"
    for layer, table in tracers[0].coalitions().items():
        other = tracers[1].coalitions()[layer]
        assert np.array_equal(table.members, other.members)
        assert np.array_equal(table.counts, other.counts)
    first, second = (tracer.statistics() for tracer in tracers)
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_one_minus_cosine_is_stable_for_small_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1000, 64, generator=generator, dtype=torch.float64)
    for size in (1e-6, 3e-3, 1.0, 50.0):
        y = size * torch.randn(1000, 64, generator=generator, dtype=torch.float64)
        exact = 0.5 * (h / h.norm(dim=1, keepdim=True) - (h + y) / (h + y).norm(dim=1, keepdim=True)).square().sum(1)
        from32 = [
            t.double() for t in ((h.float() ** 2).sum(1), (y.float() ** 2).sum(1), (h.float() * y.float()).sum(1))
        ]
        np.testing.assert_allclose(one_minus_cosine(*from32), exact, rtol=2e-4, atol=0)


def test_one_minus_cosine_of_zero_vectors_is_zero() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert one_minus_cosine(zero, one, zero).item() == 0
    assert one_minus_cosine(one, zero, zero).item() == 0
    assert one_minus_cosine(one, 4 * one, -2 * one).item() == pytest.approx(2)  # y = -2h turns it around
