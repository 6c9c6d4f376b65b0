"""Examples, batches and traces for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.calibration.batches import batches
from shape_moe.calibration.examples import Example
from shape_moe.tracing.coalitions import CoalitionTable, tabulate
from shape_moe.tracing.statistics import statistics as all_statistics
from shape_moe.tracing.trace import Trace, TraceInfo
from shape_moe.tracing.transformers_model import ModelTracer

_FINGERPRINTS = {"fingerprint": "sha256:" + "a" * 64, "layout_fingerprint": "sha256:" + "b" * 64}


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines; gives the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_examples(count: int, *, seed: int = 0, vocab: int = 128, longest: int = 14) -> list[Example]:
    """Examples of random tokens and different lengths; the second half of each is response."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        length = int(rng.integers(3, longest + 1))
        tokens = tuple(int(t) for t in rng.integers(3, vocab, length))
        examples.append(Example.answered(i, f"example {i}", tokens, (length + 1) // 2))
    return examples


def make_info(model: ModelTracer, **changes) -> TraceInfo:
    """Provenance for a trace made in a test."""
    entries = {
        **_FINGERPRINTS,
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
    rng = np.random.default_rng(seed)
    names = ("gate", "norm", "gated_norm", "gated_norm_renormalised", "gated_norm_turned", "largest_norm")
    statistics = {name: np.zeros((layers, 1, 4, 8, experts)) for name in names}
    counts = []
    for row in range(layers):
        liking = rng.normal(size=experts) + 2.2 * (rng.integers(0, 10, experts) == np.arange(10)[:, None])
        scores = liking[rng.integers(0, 10, tokens)] + 0.25 * rng.gumbel(size=(tokens, experts))
        counts.append(_count(rng, np.argpartition(-scores, top_k, axis=1)[:, :top_k], experts))
        for name in names:
            statistics[name][row] = counts[row].of_experts * rng.lognormal(sigma=0.4, size=experts)
    info = _info_without_model(
        layers,
        experts,
        top_k,
        model=model,
        tokens={"prompt": tokens // 2, "response": tokens - tokens // 2},
        examples=tokens // 10,
        versions={"shape-moe": "0.1.0"},
    )
    return _trace_of(info, statistics, counts)


def synthetic_trace(
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    tokens: int = 200,
    seed: int = 0,
    classes: tuple[str, ...] = ("",),
) -> Trace:
    """A trace without a model: random routing and random statistics that are consistent with it."""
    rng = np.random.default_rng(seed)
    size = (layers, len(classes), experts)
    statistics = {name: rng.uniform(size=s.layout.shape(*size)) for name, s in all_statistics().items()}
    counts = []
    for _ in range(layers):
        popularity = rng.dirichlet(np.ones(experts))
        members = np.array([rng.choice(experts, top_k, replace=False, p=popularity) for _ in range(tokens)])
        counts.append(_count(rng, members, experts, len(classes)))
    info = _info_without_model(
        layers,
        experts,
        top_k,
        model="synthetic",
        tokens={"prompt": 0, "response": tokens},
        examples=tokens,
        classes=classes,
    )
    return _trace_of(info, statistics, counts)


@dataclass(frozen=True)
class _Counts:
    """One layer's tokens: by coalition, by class, cell, fold and expert, and by class, cell and fold."""

    coalitions: CoalitionTable
    of_experts: np.ndarray
    of_layer: np.ndarray


def _count(rng: np.random.Generator, members: np.ndarray, experts: int, classes: int = 1) -> _Counts:
    """Count tokens, whose cells, folds and classes are drawn here."""
    segments, folds = rng.integers(0, 2, len(members)), rng.integers(0, 8, len(members))
    predicting, numbers = rng.integers(0, 2, len(members)), rng.integers(0, classes, len(members))
    of_experts = np.zeros((classes, 4, 8, experts), dtype=np.int64)
    of_layer = np.zeros((classes, 4, 8), dtype=np.int64)
    cells = 2 * segments + predicting
    np.add.at(of_experts, (numbers[:, None], cells[:, None], folds[:, None], members), 1)
    np.add.at(of_layer, (numbers, cells, folds), 1)
    return _Counts(tabulate(members, segments, folds, predicting, numbers), of_experts, of_layer)


def _trace_of(info: TraceInfo, statistics: dict[str, np.ndarray], counts: list[_Counts]) -> Trace:
    counted = {
        "tokens": np.stack([layer.of_experts for layer in counts]),
        "layer_tokens": np.stack([layer.of_layer for layer in counts]),
    }
    return Trace(info, {**statistics, **counted}, {row: layer.coalitions for row, layer in enumerate(counts)})


def _info_without_model(layers: int, experts: int, top_k: int, **entries) -> TraceInfo:
    return TraceInfo(
        **_FINGERPRINTS,
        family="qwen3_moe",
        num_experts=experts,
        routing=RouterFacts(top_k, top_k, 1, True),
        layers=tuple(range(layers)),
        **entries,
    )
