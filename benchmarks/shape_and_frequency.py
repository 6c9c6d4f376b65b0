"""How far SHAPE selections are from frequency selections, beside how far those of two halves of the data are apart.

    python -m benchmarks.shape_and_frequency [FOLDER]

on the embedded model: rule ``coverage``, six tasks, three calibration seeds, 8, 25 and 128 examples. With a folder that
holds the published values of Qwen3-30B-A3B (see ``examples/paper/selections.py``), those as well; what they say of
halves is not published.
"""

from __future__ import annotations

import sys
from itertools import product
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import write
from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.calibration.batches import batches
from shape_moe.calibration.examples import Tokeniser, TokenOptions
from shape_moe.calibration.records import Record
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.embedded_model import embedded_model_path
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.scoring.scores import Scores, read_scores, score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_scores, select_from_trace
from shape_moe.tracing.statistics import statistics
from shape_moe.tracing.token_weights import SegmentWeights
from shape_moe.tracing.trace import Trace, TraceInfo
from shape_moe.tracing.transformers_model import ModelTracer

SEEDS, SIZES, KEEP_RATES = range(3), (8, 25, 128), (0.8, 0.6, 0.4, 0.25)
ALIKE = ScoreOptions(SegmentWeights())
"""All tokens count alike, as published."""


def trace_task(model, tokenizer, task: str, size: int, seed: int) -> Trace:
    """Coalitions and counts of a task's calibration examples."""
    tokeniser = Tokeniser(tokenizer, 512, TokenOptions())
    rows = [
        tokeniser.example(Record(i, task, prompt=r["prompt"], response=r["response"]))
        for i, r in enumerate(examples(task, size, seed=seed))
    ]
    counts = [entry for name, entry in statistics().items() if name in ("tokens", "layer_tokens")]
    tracer = ModelTracer(model, counts)
    tracer.run(batches(rows, 32, 256))
    info = TraceInfo("", "", "embedded", "qwen3_moe", 32, RouterFacts(4, 4, 1, True), tracer.layers, {}, size)
    return Trace(info, tracer.statistics(), tracer.coalitions())


def different(first, second) -> float:
    """The share of kept places that two masks of equal size fill with different experts."""
    return 1 - float((first & second).sum() / first.sum())


def discounts(shape: Scores, top_k: int) -> float:
    """Median over experts in use of the share of an expert's tokens that SHAPE takes off: ``alpha_i M_i / f_i``."""
    factor = 1 / (top_k * comb(shape.num_experts, top_k))  # (k-1)! (E-k)! / E!
    used = shape.activations > 0
    return float(np.median(1 - shape.values[used] / (factor * shape.activations[used])))


def measure_embedded() -> list[dict[str, Any]]:
    """One row per number of examples and keep rate: means over tasks and seeds."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    rows = []
    for size in SIZES:
        traces = [trace_task(model, tokenizer, task, size, seed) for task, seed in product(TASKS, SEEDS)]
        discount = fmean(discounts(score_trace(trace, "shape", ALIKE), 4) for trace in traces)
        for keep in KEEP_RATES:
            chosen = [
                {
                    name: select_from_trace(trace, SelectOptions(keep, Method(name), ALIKE))
                    for name in ("shape", "frequency")
                }
                for trace in traces
            ]
            rows.append(
                {
                    "examples": size,
                    "keep": keep,
                    "median_discount": discount,
                    "shape_against_frequency": fmean(
                        different(pair["shape"].mask(), pair["frequency"].mask()) for pair in chosen
                    ),
                    "halves_of_shape": fmean(1 - pair["shape"].stability["agreement"] for pair in chosen),
                    "halves_of_frequency": fmean(1 - pair["frequency"].stability["agreement"] for pair in chosen),
                }
            )
    return rows


def measure_published(folder: Path) -> list[dict[str, Any]]:
    """The same, but for halves, from the published values of one task."""
    files = [*folder.glob("*shapley_values.csv"), *folder.glob("results/qwen3-30b-a3b/shapley_values/*_shapley.csv")]
    rows = []
    for file in sorted(files):
        shape = read_scores(file)
        frequency = Scores("frequency", shape.layers, shape.activations, shape.activations)
        for keep in KEEP_RATES:
            masks = [select_from_scores(scores, SelectOptions(keep)).mask() for scores in (shape, frequency)]
            rows.append({"task": file.name.partition("_s")[0], "keep": keep, "different": different(*masks)})
    return rows


def main() -> None:
    """Measure and write."""
    results: dict[str, Any] = {
        "what": f"share of kept experts that differ, rule coverage, embedded model, mean over {len(TASKS)} tasks and "
        f"{len(SEEDS)} seeds; halves: selections of the even and the odd folds alone",
        "rows": measure_embedded(),
    }
    if len(sys.argv) > 1:
        results["published"] = measure_published(Path(sys.argv[1]))
    write("shape_and_frequency", results)


if __name__ == "__main__":
    main()
