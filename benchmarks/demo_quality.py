"""What pruning costs on the embedded model: scorers and rules over keep rates, six tasks and ten calibration seeds.

Every token counts alike, for every scorer.
"""

from __future__ import annotations

from itertools import product
from statistics import fmean, stdev

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import RESULTS, write
from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.calibration.batches import batches
from shape_moe.calibration.examples import Tokeniser, TokenOptions
from shape_moe.calibration.records import Record
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.embedded_model import embedded_model_path
from shape_moe.pruning.masks import masked
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.controls import inverted_selection
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.tracing.token_weights import SegmentWeights
from shape_moe.tracing.trace import Trace, TraceInfo
from shape_moe.tracing.transformers_model import ModelTracer

SEEDS = range(10)
KEEP_RATES = (0.8, 0.6, 0.4, 0.25)
METHODS = (
    ("shape", "coverage"),
    ("shape, inverted", "coverage"),
    ("shape", "uniform"),
    ("random", "uniform"),
    ("frequency", "uniform"),
    ("gating", "uniform"),
    ("ean", "uniform"),
    ("reap", "uniform"),
    ("easy-ep", "uniform"),
    ("contribution", "global"),
)
EXAMPLES, PROMPTS = 25, 100


def trace_task(model, tokenizer, task: str, seed: int) -> Trace:
    """Trace a task's calibration examples."""
    tokeniser = Tokeniser(tokenizer, 512, TokenOptions())
    records = examples(task, EXAMPLES, seed=seed)
    rows = [
        tokeniser.example(Record(i, task, prompt=r["prompt"], response=r["response"])) for i, r in enumerate(records)
    ]
    tracer = ModelTracer(model)
    tracer.run(batches(rows, EXAMPLES, 256))
    info = TraceInfo("", "", "embedded", "qwen3_moe", 32, RouterFacts(4, 4, 1, True), tracer.layers, {}, EXAMPLES)
    return Trace(info, tracer.statistics(), tracer.coalitions())


def choose(trace: Trace, scorer: str, rule: str, keep: float, seed: int):
    """The selection of one method."""
    name, scoring = scorer.removesuffix(", inverted"), ScoreOptions(SegmentWeights(), seed)
    selection = select_from_trace(trace, SelectOptions(keep, Method(name, rule), scoring))
    return selection if name == scorer else inverted_selection(selection, score_trace(trace, name, scoring))


def main() -> None:
    """Measure, write and draw."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    dense = exact_match(model, tokenizer, count=PROMPTS)
    found: dict[tuple[str, str, float], list[float]] = {}
    for seed in SEEDS:
        points: dict[tuple[str, str, float], list[float]] = {}
        for task in TASKS:
            trace = trace_task(model, tokenizer, task, seed)
            for (scorer, rule), keep in product(METHODS, KEEP_RATES):
                with masked(model, choose(trace, scorer, rule, keep, seed)):
                    score = exact_match(model, tokenizer, [task], count=PROMPTS)[task]
                points.setdefault((scorer, rule, keep), []).append(100 * score)
        for key, scores in points.items():
            found.setdefault(key, []).append(fmean(scores))
    rows = [
        {"scorer": scorer, "rule": rule, "keep": keep, "mean": fmean(means), "deviation_over_seeds": stdev(means)}
        for (scorer, rule, keep), means in found.items()
    ]
    results = {
        "what": f"exact match in percent on the traced task, mean over {len(TASKS)} tasks, {EXAMPLES} calibration "
        f"examples, {len(SEEDS)} seeds, routing drop, {PROMPTS} held-out prompts",
        "dense": 100 * fmean(dense.values()),
        "rows": rows,
    }
    write("demo_quality", results)
    draw(results)


def draw(results: dict) -> None:
    """The picture of the README."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "shape-moe", "font.size": 11})
    figure, axes = plt.subplots(figsize=(8.8, 4.2))
    colours = {
        "contribution": "#0b6e4f",
        "shape": "#1f4e9e",
        "easy-ep": "#d4a017",
        "reap": "#b3541e",
        "frequency": "#7a6c9d",
        "random": "#8a8a8a",
    }
    labels = {"contribution": "contribution (ours)", "shape, inverted": "SHAPE, highest\nvalues removed"}
    shown = [
        ("easy-ep", "uniform"),
        ("contribution", "global"),
        ("reap", "uniform"),
        ("shape", "coverage"),
        ("frequency", "uniform"),
    ]
    shown += [("random", "uniform"), ("shape, inverted", "coverage")]
    for scorer, rule in shown:
        rows = [row for row in results["rows"] if (row["scorer"], row["rule"]) == (scorer, rule)]
        keep = [1.0, *(row["keep"] for row in rows)]
        mean = [results["dense"], *(row["mean"] for row in rows)]
        axes.plot(
            keep,
            mean,
            marker="o",
            markersize=4,
            linestyle="--" if "inverted" in scorer else "-",
            color=colours.get(scorer, "#c0392b"),
            label=labels.get(scorer, "SHAPE" if scorer == "shape" else scorer),
        )
    axes.set_xlim(1.02, 0.23)
    axes.set_ylim(-2, 104)
    axes.set_xlabel("share of experts kept")
    axes.set_ylabel("exact match on the task (%)")
    axes.set_title("Embedded model, pruned for one task (mean of 6 tasks, 10 calibration seeds)", fontsize=10.5)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9.5)
    figure.tight_layout()
    target = RESULTS.parent.parent / "docs" / "images"
    target.mkdir(parents=True, exist_ok=True)
    figure.savefig(target / "demo_quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
