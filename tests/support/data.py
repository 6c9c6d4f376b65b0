"""Examples, batches and traces for tests."""

from __future__ import annotations

import numpy as np

from shape_moe.architectures.moe_config import RoutingFacts
from shape_moe.calibration.batches import batches
from shape_moe.calibration.examples import Example
from shape_moe.tracing.trace import Trace, TraceInfo
from shape_moe.tracing.transformers_model import ModelTracer


def make_examples(count: int, *, seed: int = 0, vocab: int = 128, longest: int = 14) -> list[Example]:
    """Examples of random tokens and different lengths; the second half of each is response."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        length = int(rng.integers(3, longest + 1))
        tokens = tuple(int(t) for t in rng.integers(3, vocab, length))
        examples.append(Example(i, f"example {i}", tokens, (length + 1) // 2))
    return examples


def make_info(model: ModelTracer, **changes) -> TraceInfo:
    """Provenance for a trace made in a test."""
    entries = {
        "fingerprint": "sha256:" + "a" * 64,
        "layout_fingerprint": "sha256:" + "b" * 64,
        "model": "tiny",
        "family": model.moe.family.model_type,
        "num_experts": model.moe.num_experts,
        "routing": model.moe.routing,
        "layers": model.layers,
        "tokens": {"prompt": 0, "response": 0},
        "examples": 0,
    }
    return TraceInfo(**{**entries, **changes})


def trace_model(model, examples: list[Example], batch_size: int = 4, **changes) -> Trace:
    """Trace examples with a live model."""
    tracer = ModelTracer(model)
    tracer.run(batches(examples, batch_size, 0))
    return Trace(make_info(tracer, examples=len(examples), **changes), tracer.statistics(), tracer.coalitions())


def routing_trace(
    layers: int = 4, experts: int = 16, top_k: int = 4, tokens: int = 400, *, seed: int = 0, model: str = "synthetic"
) -> Trace:
    """A trace of any size without a model or Gram matrices: tokens of ten topics, each with experts that it prefers."""
    from shape_moe.tracing.coalitions import tabulate

    rng = np.random.default_rng(seed)
    names = ("tokens", "gate", "norm", "gated_norm", "gated_norm_renormalised", "gated_norm_turned", "largest_norm")
    statistics = {name: np.zeros((layers, 2, 8, experts)) for name in names}
    per_layer = np.zeros((layers, 2, 8), dtype=np.int64)
    tables = {}
    for row in range(layers):
        liking = rng.normal(size=experts) + 2.2 * (rng.integers(0, 10, experts) == np.arange(10)[:, None])
        scores = liking[rng.integers(0, 10, tokens)] + 0.25 * rng.gumbel(size=(tokens, experts))
        members = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
        segments, folds = rng.integers(0, 2, tokens), rng.integers(0, 8, tokens)
        tables[row] = tabulate(members, segments, folds)
        np.add.at(per_layer[row], (segments, folds), 1)
        np.add.at(statistics["tokens"][row], (segments[:, None], folds[:, None], members), 1)
        for name in names[1:]:
            statistics[name][row] = statistics["tokens"][row] * rng.lognormal(sigma=0.4, size=experts)
    statistics |= {"tokens": statistics["tokens"].astype(np.int64), "layer_tokens": per_layer}
    info = TraceInfo(
        fingerprint="sha256:" + "a" * 64,
        layout_fingerprint="sha256:" + "b" * 64,
        model=model,
        family="qwen3_moe",
        num_experts=experts,
        routing=RoutingFacts(top_k, top_k, 1, True),
        layers=tuple(range(layers)),
        tokens={"prompt": tokens // 2, "response": tokens - tokens // 2},
        examples=tokens // 10,
        versions={"shape-moe": "0.1.0"},
    )
    return Trace(info, statistics, tables)


def synthetic_trace(layers: int = 3, experts: int = 8, top_k: int = 2, tokens: int = 200, seed: int = 0) -> Trace:
    """A trace without a model: random routing and random statistics that are consistent with it."""
    from shape_moe.tracing.coalitions import tabulate
    from shape_moe.tracing.statistics import STATISTICS

    rng = np.random.default_rng(seed)
    shapes = {"expert": (layers, 2, 8, experts), "layer": (layers, 2, 8), "pair": (layers, 2, 2, experts, experts)}
    statistics = {name: rng.uniform(size=shapes[s.axes]) for name, s in STATISTICS.items()}
    counts = np.zeros(shapes["expert"], dtype=np.int64)
    per_layer = np.zeros(shapes["layer"], dtype=np.int64)
    tables = {}
    for row in range(layers):
        popularity = rng.dirichlet(np.ones(experts))
        members = np.array([rng.choice(experts, top_k, replace=False, p=popularity) for _ in range(tokens)])
        segments, folds = rng.integers(0, 2, tokens), rng.integers(0, 8, tokens)
        tables[row] = tabulate(members, segments, folds)
        np.add.at(per_layer[row], (segments, folds), 1)
        np.add.at(counts[row], (segments[:, None], folds[:, None], members), 1)
    statistics |= {"tokens": counts, "layer_tokens": per_layer}
    info = TraceInfo(
        fingerprint="sha256:" + "a" * 64,
        layout_fingerprint="sha256:" + "b" * 64,
        model="synthetic",
        family="qwen3_moe",
        num_experts=experts,
        routing=RoutingFacts(top_k, top_k, 1, True),
        layers=tuple(range(layers)),
        tokens={"prompt": 0, "response": tokens},
        examples=tokens,
    )
    return Trace(info, statistics, tables)
