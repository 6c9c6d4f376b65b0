"""SHAPE values: the package against the plain transcription, and one layer of a million tokens."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from benchmarks import plain_shape
from benchmarks.harness import paired, peak_memory, seconds, write
from shape_moe.scoring.shape import shape_values

LAYERS, TOKENS = 48, 9_000


def routed(tokens: int, experts: int, top_k: int, seed: int) -> np.ndarray:
    """Top-k sets of tokens under a skewed popularity with topics: neither uniform nor all alike."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(32, experts))
    scores = (
        topics[rng.integers(0, 32, tokens)] * 1.5 + rng.normal(size=experts) + rng.gumbel(size=(tokens, experts)) * 0.5
    )
    return np.sort(np.argpartition(-scores, top_k, axis=1)[:, :top_k], axis=1)


def whole_model(experts: int, top_k: int, pairs: int) -> dict[str, float]:
    """All layers of a trace, counted coalitions in, values out."""
    layers = []
    for seed in range(LAYERS):
        members, counts = np.unique(routed(TOKENS, experts, top_k, seed), axis=0, return_counts=True)
        layers.append((members, counts, [tuple(row) for row in members.tolist()], counts.tolist()))
    for members, counts, rows, numbers in layers[:3]:
        found = shape_values(members, counts, experts)
        np.testing.assert_allclose(found, plain_shape.shape_values(rows, numbers, experts), rtol=1e-9, atol=1e-300)

    def plain() -> None:
        for _, _, rows, numbers in layers:
            plain_shape.shape_values(rows, numbers, experts)

    def ours() -> None:
        for members, counts, _, _ in layers:
            shape_values(members, counts, experts)

    result = paired(plain, ours, pairs)
    coalitions = sum(len(members) for members, *_ in layers)
    return {"experts": experts, "top_k": top_k, "layers": LAYERS, "tokens": TOKENS, "coalitions": coalitions, **result}


def million() -> None:
    """One layer of a million tokens, in a process of its own so that its memory can be told."""
    members = np.concatenate([routed(20_000, 128, 8, seed) for seed in range(50)])  # in pieces: generating takes memory
    counts = np.ones(len(members), dtype=np.int64)
    prepared = peak_memory()
    took = seconds(lambda: shape_values(members, counts, 128))
    print(took, peak_memory() / 2**30, prepared / 2**30)


def main() -> None:
    """Measure and write."""
    output = subprocess.run(
        [sys.executable, "-c", "from benchmarks.shape_values import million; million()"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    write(
        "shape_values",
        {
            "48 layers, 128 experts, top-8": whole_model(128, 8, 5),
            "48 layers, 512 experts, top-10": whole_model(512, 10, 5),
            "a million tokens in one layer": {
                "seconds": float(output[0]),
                "peak_gib": float(output[1]),
                "before_gib": float(output[2]),
            },
        },
    )


if __name__ == "__main__":
    main()
