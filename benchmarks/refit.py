"""What a refit gives on the embedded model, and what it costs for one layer of a large model's true shape.

``python -m benchmarks.refit quality`` and ``python -m benchmarks.refit cost`` write a part of the results each; without
a word both are measured, the cost in processes of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import fmean, median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.demo_quality import trace_task
from benchmarks.harness import RESULTS, peak_memory, write
from shape_moe.architectures.live_layers import LiveLayers
from shape_moe.calibration.batches import batches
from shape_moe.calibration.examples import Example, Tokeniser, TokenOptions
from shape_moe.calibration.records import Record
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.embedded_model import embedded_model_path
from shape_moe.pruning.masks import masked
from shape_moe.refitting.layers import RefitPass, RefitRequest
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection, whole_selection

SEEDS = range(2)
EXAMPLES, PROMPTS = 25, 100
CASES = (
    ("shape", "coverage", "reroute", 0.4),
    ("shape", "coverage", "reroute", 0.25),
    ("shape", "coverage", "drop", 0.25),
    ("replacement", "coverage", "reroute", 0.15),
    ("shape", "uniform", "reroute", 0.4),
    ("shape", "uniform", "reroute", 0.25),
    ("reap", "uniform", "reroute", 0.4),
    ("reap", "uniform", "reroute", 0.25),
    ("replacement", "uniform", "reroute", 0.4),
    ("replacement", "uniform", "reroute", 0.25),
)
HIDDEN, EXPERTS, WIDTH, TOP_K, KEPT, TOKENS, ROWS = 2048, 128, 768, 8, 77, 8192, 16
PAIRS = 2
RHO = 3.0


def rows_of(tokenizer, task: str, seed: int) -> list[Example]:
    """A task's calibration examples, those that are traced."""
    tokeniser = Tokeniser(tokenizer, 512, TokenOptions())
    records = examples(task, EXAMPLES, seed=seed)
    return [
        tokeniser.example(Record(i, task, prompt=r["prompt"], response=r["response"])) for i, r in enumerate(records)
    ]


def quality() -> dict[str, object]:
    """Exact match in percent, as pruned and refitted, mean over tasks and seeds."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    found: dict[tuple, list[tuple[float, float]]] = {case: [] for case in CASES}
    per_unknown = []
    for seed in SEEDS:
        for task in TASKS:
            trace = trace_task(model, tokenizer, task, seed)
            todo = list(batches(rows_of(tokenizer, task, seed), EXAMPLES, 256))
            for scorer, rule, routing, keep in CASES:
                asked = SelectOptions(keep, Method(scorer, rule, routing), ScoreOptions(seed=seed), allow_rounding=True)
                selection = select_from_trace(trace, asked)
                engine = LiveLayers(model)
                with engine.attached():
                    refitted = RefitPass(engine, selection, todo, RefitRequest(0.3, stored=torch.bfloat16)).run()
                per_unknown.append(refitted.tokens_per_unknown)
                pair = []
                for subject in (selection, refitted.applied_to(selection)):
                    with masked(model, subject):
                        pair.append(100 * exact_match(model, tokenizer, [task], count=PROMPTS)[task])
                found[scorer, rule, routing, keep].append((pair[0], pair[1]))
                print(seed, task, scorer, rule, routing, keep, *pair, file=sys.stderr, flush=True)
    return {
        "what": f"exact match in percent on the traced task, mean over {len(TASKS)} tasks and {len(SEEDS)} seeds, "
        f"{EXAMPLES} calibration examples, {PROMPTS} other prompts, rho 0.3, weights stored in bfloat16",
        "tokens_per_unknown": fmean(per_unknown),
        "rows": [
            {
                "scorer": case[0],
                "rule": case[1],
                "routing": case[2],
                "keep": case[3],
                "as_pruned": fmean(before for before, _ in pairs),
                "refitted": fmean(after for _, after in pairs),
            }
            for case, pairs in found.items()
        ],
    }


def one_layer(dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    """A decoder layer of Qwen3-30B-A3B's shape with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor time of all threads: other work on the machine does not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def cost(name: str) -> dict[str, object]:
    """Refit of one layer against forward passes of it, in turn, and the peak of memory."""
    imported = peak_memory()
    model = one_layer(getattr(torch, name))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1024, (ROWS, TOKENS // ROWS), generator=generator).tolist()
    rows = [Example.answered(i, "", tuple(row), len(row) // 2) for i, row in enumerate(tokens)]
    todo = list(batches(rows, 1, 0))
    selection: Selection = whole_selection([0], EXPERTS)
    kept = sorted(torch.randperm(EXPERTS, generator=generator)[:KEPT].tolist())
    selection = Selection(**{**vars(selection), "layers": {0: kept}, "routing": "reroute"})
    engine = LiveLayers(model)
    said = []

    def refit() -> None:
        said.append(RefitPass(engine, selection, todo, RefitRequest(RHO, tries=1)).run().layers[0])

    with engine.attached():
        entering = [engine.enter(batch.input_ids, batch.attention_mask) for batch in todo]

        def forward() -> None:
            for _ in engine.layers(0, 1):
                for hidden, batch in zip(entering, todo, strict=True):
                    engine.advance(hidden, batch.attention_mask)

        forward()
        times = []
        for _ in range(PAIRS):
            times.append((processor_seconds(refit), processor_seconds(forward)))
            print(times[-1], said[-1], peak_memory() - imported, file=sys.stderr, flush=True)
    return {
        "forward_processor_seconds": median(b for _, b in times),
        "refit_processor_seconds": median(a for a, _ in times),
        "forward_passes": median(a / b for a, b in times),
        "forward_passes_smallest": min(a / b for a, b in times),
        "forward_passes_largest": max(a / b for a, b in times),
        "peak_bytes_above_imports": peak_memory() - imported,
        "residual_after": said[0].after / said[0].before,
        "held_out_after": said[0].held_out_after / said[0].held_out_before,
        "tokens_per_unknown": said[0].tokens / said[0].unknowns,
        "taken": said[0].rho is not None,
    }


def main() -> None:
    """Measure what is asked for, and write."""
    what = sys.argv[1:] or ["quality", "cost"]
    if what[0] in ("bfloat16", "float32"):
        print(json.dumps(cost(what[0])))
        return
    file = RESULTS / "refit.json"
    results = json.loads(file.read_text())["results"] if file.is_file() else {}
    if "quality" in what:
        results["quality"] = quality()
    if "cost" in what:
        shape = (
            f"one decoder layer, hidden {HIDDEN}, {EXPERTS} experts of width {WIDTH}, top-{TOP_K}, {KEPT} kept, "
            f"{TOKENS} tokens in rows of {TOKENS // ROWS}, random weights, one rho, 3 sweeps"
        )
        results["cost"] = {"shape": shape}
        for name in ("bfloat16", "float32"):
            command = [sys.executable, "-m", "benchmarks.refit", name]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results["cost"][name] = json.loads(found.splitlines()[-1])
    write("refit", results)


if __name__ == "__main__":
    main()
