"""Is the automatic choice any good? Regret of scorer auto, and whether swept limits hold on fresh data."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.harness import write
from shape_moe.architectures.loading import load_model, load_tokenizer
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.embedded_model import embedded_model_path
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.jobs.auto import auto_select
from shape_moe.jobs.choice import ChoiceOptions, pairs_to_try
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.planning import plan_search
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import AUTO
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.jobs.sweep import SweepOptions, sweep
from shape_moe.progress import SILENT
from shape_moe.pruning.masks import masked
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, TraceSelector

KEEP, SEEDS, PROMPTS, RECORDS = 0.4, range(10), 100, 192
FEW = GenerationOptions(examples=16)


def write_task(folder: Path, task: str, seed: int, count: int = RECORDS) -> Path:
    """A file of calibration examples."""
    file = folder / f"{task}-{seed}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in examples(task, count, seed=seed)), encoding="utf-8")
    return file


def regret(folder: Path, model, tokenizer) -> dict:
    """Exact match of every fixed method and of the automatic choice, by task and seed."""
    pairs = [pair for pair in pairs_to_try(equal_counts=False, effort="thorough") if pair[1] != "measured"]
    methods = [Method(scorer, rule, routing) for scorer, rule in pairs for routing in ("drop", "reroute")]
    scores: dict[str, list[float]] = {"auto": []}
    picked: dict[str, int] = {}
    for seed in SEEDS:
        for task in TASKS:
            options = ExampleOptions(DataOptions(str(write_task(folder, task, seed)), samples=128), device="cpu")
            snapshot = open_snapshot(embedded_model_path())
            plan = plan_search(snapshot, options, None, None, 64, seed, SILENT)
            plan.session.use(model)
            trace = plan.session.run(None)
            job = SelectOptions(KEEP, method=Method(AUTO), scoring=ScoreOptions(seed=seed))
            found = auto_select(snapshot, plan, trace, job, ChoiceOptions(generation=FEW), SILENT)
            selector, known = TraceSelector(trace), {}

            def judge(selection, task=task, seed=seed, known=known):
                if selection.digest not in known:
                    with masked(model, selection):
                        match = exact_match(model, tokenizer, [task], count=PROMPTS, seed=1000 + seed)
                    known[selection.digest] = 100 * match[task]
                return known[selection.digest]

            for way in methods:
                selection = selector.select(SelectOptions(KEEP, way))
                scores.setdefault(str(way), []).append(judge(selection))
            scores["auto"].append(judge(found))
            name = str(found.method)
            picked[name] = picked.get(name, 0) + 1
    means = {name: fmean(values) for name, values in scores.items()}
    fixed = {name: value for name, value in means.items() if name != "auto"}
    best = max(fixed, key=lambda name: fixed[name])
    oracle = [max(values) for values in zip(*(scores[name] for name in fixed), strict=True)]
    return {
        "what": f"exact match in percent at keep {KEEP}: 6 tasks, {len(SEEDS)} seeds, {PROMPTS} fresh prompts each",
        "means": dict(sorted(means.items(), key=lambda item: -item[1])),
        "best_single": best,
        "regret_to_best_single": means[best] - means["auto"],
        "regret_to_the_best_of_each_run": fmean(oracle) - means["auto"],
        "picked": dict(sorted(picked.items(), key=lambda item: -item[1])),
    }


def limits_hold(folder: Path) -> dict:
    """Does what a sweep recommends stay within its limit on fresh data, pruned for real?"""
    rows = []
    for kind, value in (("max_drop", 0.01), ("max_kl", 0.02)):
        for seed in SEEDS:
            rows.append(_one_limit(folder, Limit(kind, value), seed))  # noqa: PERF401 -- a run each, not a table
    return {
        "what": "sweeps of shape and easy-ep x coverage and uniform with 640 held-out examples of addition; the "
        "recommended point pruned for real and judged on 1000 fresh prompts",
        "rows": rows,
        "kept_limit": {
            kind: sum(row["within"] for row in rows if row["kind"] == kind) for kind in ("max_drop", "max_kl")
        },
        "seconds_of_a_sweep": median(row["seconds"] for row in rows),
    }


def _one_limit(folder: Path, limit: Limit, seed: int) -> dict:
    file, began = write_task(folder, "addition", 100 + seed, 128 + 640), time.perf_counter()
    options = SweepOptions(
        limit=limit,
        held_out=640,
        methods=tuple(Method(*pair) for pair in product(("shape", "easy-ep"), ("coverage", "uniform"))),
        scoring=ScoreOptions(seed=seed),
        generation=FEW,
    )
    data = ExampleOptions(DataOptions(str(file), samples=128), device="cpu")
    result = sweep(embedded_model_path(), options, data=data)
    seconds = time.perf_counter() - began
    row = {"kind": limit.kind, "limit": limit.value, "seed": seed, "seconds": seconds}
    if result.chosen is None:
        return {**row, "keep": None, "within": True}
    out = folder / f"pruned-{limit.kind}-{seed}"
    path = prune(embedded_model_path(), out, PruneOptions(check_logits=False), selection=result.chosen.selection).path
    loss = _fresh_loss(folder, path, limit, seed)
    return {**row, "keep": result.chosen.selection.keep, "loss": loss, "within": loss <= limit.value + 1e-9}


def _fresh_loss(folder: Path, path: Path, limit: Limit, seed: int) -> float:
    """What a checkpoint loses on fresh prompts, as the limit counts it."""
    dense, pruned = (load_model(open_snapshot(place), device="cpu") for place in (embedded_model_path(), path))
    tokenizer = load_tokenizer(path)
    if limit.kind == "max_drop":
        match = [exact_match(m, tokenizer, ["addition"], count=1000, seed=9000 + seed) for m in (dense, pruned)]
        return match[0]["addition"] - match[1]["addition"]
    file = folder / f"fresh-{seed}.jsonl"
    rows = examples("addition", 1000, seed=9000 + seed, held_out=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    session = ModelSession.open(dense, ExampleOptions(DataOptions(str(file)), device="cpu"), tokenizer, SILENT)
    held_out = held_out_set(session, session.calibrator, "fresh")
    with Bench(dense, tokenizer, held_out) as bench:
        sums = bench.sums(pruned)
    return float(sums.kl.sum() / sums.tokens.sum())


def main() -> None:
    """Measure and write; ``regret`` or ``limits`` as an argument runs one of the two."""
    torch.set_num_threads(2)
    wanted = sys.argv[1:] or ["regret", "limits"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "regret" in wanted:
            path = embedded_model_path()
            model, tokenizer = load_model(open_snapshot(path), device="cpu", dtype="float32"), load_tokenizer(path)
            write("automatic_choice", regret(folder, model, tokenizer))
        if "limits" in wanted:
            write("sweep_limits", limits_hold(folder))


if __name__ == "__main__":
    main()
