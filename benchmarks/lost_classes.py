"""Is a class that was lost named, and a healthy one left in peace? Files of two tasks, pruned by default."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.harness import write
from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.embedded_model import embedded_model_path
from shape_moe.evaluation.dense_reference import DenseReference
from shape_moe.evaluation.teacher_forced import compare_with_dense, record_dense
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.judgement import JudgementOptions, judge_selection, set_aside
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.progress import SILENT
from shape_moe.pruning.masks import masked
from shape_moe.selection.method import PUBLISHED_SAMPLES
from shape_moe.selection.select import SelectOptions, TraceSelector

KEEP, SEEDS, EACH, PROMPTS = 0.6, range(1, 4), 25, 200
LOST, HEALTHY = 0.1, 0.05


class Truth:
    """Exact match of both classes on many other prompts."""

    def __init__(self, folder: Path, session: ModelSession, tasks: tuple[str, str]) -> None:
        file = folder / "fresh.jsonl"
        fresh = [row for task in tasks for row in examples(task, PROMPTS, seed=777, held_out=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in fresh), encoding="utf-8")
        data = DataOptions(str(file), stratify="task")
        self.held_out = held_out_set(session, session.calibrator_of(load_records(data), data), "other prompts")
        self.reference, self.tasks = DenseReference(), tasks
        self.dense = self._by_task(record_dense(session.model, self.held_out, self.reference).exact)

    def exact(self, model: PreTrainedModel) -> dict[str, float]:
        """Of a model in which experts are masked."""
        return self._by_task(compare_with_dense(model, self.held_out, self.reference).exact)

    def _by_task(self, exact: np.ndarray) -> dict[str, float]:
        groups = np.array(self.held_out.groups)
        return {task: float(exact[groups == task].mean()) for task in self.tasks}


def runs(folder: Path, seeds: range) -> list[dict]:
    """One row for each class of each file: what it really lost, and whether the verdict names it."""
    snapshot = open_snapshot(embedded_model_path())
    model = load_model(snapshot, device="cpu", dtype="float32")
    rows, truths = [], {}
    for tasks, seed in itertools.product(itertools.combinations(TASKS, 2), seeds):
        file = folder / "mixed.jsonl"
        both = [row for task in tasks for row in examples(task, EACH, seed=seed)]
        file.write_text("".join(json.dumps(row) + "\n" for row in both), encoding="utf-8")
        data = DataOptions(str(file), samples=PUBLISHED_SAMPLES)
        parts = set_aside(data, JudgementOptions(), give_up=False)
        options = ExampleOptions(data, device="cpu", dtype="float32")
        session = ModelSession.open(snapshot, options, None, SILENT, parts.calibration)
        session.use(model)
        if tasks not in truths:
            truths[tasks] = Truth(folder, session, tasks)
        others = truths[tasks]
        selection = TraceSelector(session.run(None)).select(SelectOptions(KEEP))
        asked = JudgementOptions(general=False, answers=1, minutes=None)
        verdict = judge_selection(session, parts, data, selection, asked).verdict
        with masked(model, selection):
            after = others.exact(model)
        for task in tasks:
            fall = 1 - after[task] / others.dense[task]
            rows.append({"tasks": tasks, "seed": seed, "class": task, "fall": fall, "named": task in verdict.suspects})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write; an argument gives the number of seeds."""
    torch.set_num_threads(1)
    seeds = range(1, 1 + int(sys.argv[1])) if len(sys.argv) > 1 else SEEDS
    with tempfile.TemporaryDirectory() as name:
        rows = runs(Path(name), seeds)
    lost = [row["named"] for row in rows if row["fall"] >= LOST]
    healthy = [row["named"] for row in rows if row["fall"] < HEALTHY]
    write(
        "lost_classes",
        {
            "what": f"two tasks of {EACH} records each, keep {KEEP}, shape/coverage, {PUBLISHED_SAMPLES} calibration "
            f"examples; the true fall of exact match: on {PROMPTS} other prompts, as a share of the dense model's",
            "lost_classes": len(lost),
            "of_them_named": sum(lost),
            "healthy_classes": len(healthy),
            "of_them_named_wrongly": sum(healthy),
            "between": len(rows) - len(lost) - len(healthy),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
