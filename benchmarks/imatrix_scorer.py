"""Scorer imatrix-energy beside frequency and EAN on the embedded model: what is left of each task.

The imatrix is collected by a hook on the embedded model, as llama.cpp collects it: once from the task's own examples,
and once from those of the other five tasks, which stand for the general text that imatrices are made from.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.harness import write
from shape_moe.architectures.loading import load_model, load_tokenizer
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.embedded_model import embedded_model_path
from shape_moe.interop.imatrix import Entry, Imatrix, write_imatrix
from shape_moe.interop.imatrix_trace import read_imatrix_trace
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.pruning.masks import masked
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.tracing.trace import Trace

KEEPS, RULE, SAMPLES, PROMPTS = (0.6, 0.4), "uniform", 25, 100


def collect(model: Any, tokenizer: Any, texts: list[str], file: Path) -> Path:
    """Sums of squares of what down projections are multiplied with, and tokens, by expert."""
    found: dict[str, Entry] = {}

    def hook_for(name: str) -> Any:
        def hook(experts: Any, arguments: tuple[Any, ...], _: Any) -> None:
            states, chosen = arguments[0].reshape(-1, arguments[0].shape[-1]), arguments[1]
            count, width = len(experts.gate_up_proj), experts.down_proj.shape[-1]
            empty = Entry(np.zeros((count, width), np.float32), np.zeros(count, np.float32))
            entry = found.setdefault(name, empty)
            for expert in range(count):
                rows = states[(chosen == expert).any(dim=1)]
                gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                entry.sums[expert] += (experts.act_fn(gate) * up).square().sum(dim=0).numpy()
                entry.counts[expert] += len(rows)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            name = f"blk.{number}.ffn_down_exps.weight"
            handle = layer.mlp.experts.register_forward_pre_hook(hook_for(name), with_kwargs=True)
            hooks.callback(handle.remove)
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text).input_ids]))
    write_imatrix(Imatrix(found, ("examples.txt",), chunks=1, chunk_size=512), file)
    return file


def kept_right(model: Any, tokenizer: Any, task: str, made: Trace, scorer: str, keep: float) -> float:
    """Share of right answers of a task, once pruned by a scorer."""
    selection = select_from_trace(made, SelectOptions(keep, Method(scorer, RULE, "reroute")))
    with masked(model, selection):
        return exact_match(model, tokenizer, [task], count=PROMPTS)[task]


def measure_task(task: str, snapshot: Snapshot, model: Any, tokenizer: Any, scratch: Path) -> dict[str, Any]:
    """Every scorer at every keep rate, on one task."""
    own = examples(task, SAMPLES, seed=1)
    file = scratch / f"{task}.gguf"
    texts = ["".join(map(str, example.values())) for example in own]
    others = [
        "".join(map(str, example.values()))
        for other in TASKS
        if other != task
        for example in examples(other, 5, seed=2)
    ]
    traces = {
        "traced": trace(snapshot.path, ExampleOptions(DataOptions.of(own, samples=SAMPLES), device="cpu")),
        "own text": read_imatrix_trace(collect(model, tokenizer, texts, file), snapshot),
        "other text": read_imatrix_trace(collect(model, tokenizer, others, file), snapshot),
    }
    ways = {
        "frequency": ("traced", "frequency"),
        "ean": ("traced", "ean"),
        "imatrix-energy, own text": ("own text", "imatrix-energy"),
        "imatrix-energy, other text": ("other text", "imatrix-energy"),
    }
    return {
        name: {str(keep): kept_right(model, tokenizer, task, traces[source], scorer, keep) for keep in KEEPS}
        for name, (source, scorer) in ways.items()
    }


def main() -> None:
    """Measure and write."""
    snapshot = open_snapshot(embedded_model_path())
    model, tokenizer = load_model(snapshot, device="cpu", dtype="float32"), load_tokenizer(snapshot.path)
    with tempfile.TemporaryDirectory() as scratch:
        by_task = {task: measure_task(task, snapshot, model, tokenizer, Path(scratch)) for task in TASKS}
    mean = {
        name: {str(keep): fmean(rows[name][str(keep)] for rows in by_task.values()) for keep in KEEPS}
        for name in next(iter(by_task.values()))
    }
    write("imatrix_scorer", {"rule": RULE, "routing": "reroute", "prompts": PROMPTS, "mean": mean, "tasks": by_task})


if __name__ == "__main__":
    main()
