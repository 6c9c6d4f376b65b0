"""Benchmark tasks of an evaluation: on live models, in vLLM, and compared with the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import UsageError
from shape_moe.evaluation.evaluated import Evaluated
from shape_moe.evaluation.harness import TaskOptions, run_tasks_with_vllm
from shape_moe.evaluation.subjects import Candidate
from shape_moe.evaluation.task_results import task_changes
from shape_moe.progress import Progress


def tasks_in_vllm(
    models: Sequence[Evaluated],
    dense: Snapshot,
    candidates: Sequence[Candidate],
    asked: TaskOptions,
    *,
    dtype: str,
    seed: int,
    progress: Progress,
) -> None:
    """Run the tasks in vLLM, one model after the other, when nothing else is loaded.

    Args:
        models: what is evaluated; their results are filled in.
        dense: the dense model on disk, which also runs with a selection applied.
        candidates: what is judged beside it.
        asked: the tasks.
        dtype: in which dtype, where the engine's arguments name none.
        seed: draws few-shot examples.
        progress: where to show progress.
    """
    own_dtype = {} if dtype == "auto" else {"dtype": dtype}
    asked = replace(asked, engine_args={**own_dtype, **asked.engine_args})
    entries = {entry.name: entry for entry in candidates}
    for found in models:
        entry = entries.get(found.name)
        on_disk = entry.snapshot if entry is not None and entry.snapshot is not None else dense
        found.tasks = run_tasks_with_vllm(
            on_disk.path,
            asked,
            selection=entry.selection if entry is not None and found.kind == "mask" else None,
            seed=seed,
            progress=progress,
        )


def compare_tasks(models: Sequence[Evaluated], *, seed: int) -> list[str]:
    """Pair every model's tasks with those of the first, the dense one, item by item.

    Returns:
        What could not be compared, as sentences.
    """
    dense, failures = models[0].tasks, []
    for found in models[1:]:
        found.task_changes = {}
        for name, result in found.tasks.items():
            try:
                found.task_changes[name] = task_changes(result, dense[name], seed=seed)
            except UsageError as error:  # what was judged before is worth keeping
                failures.append(f"{found.name} and the dense model cannot be compared: {error}")
    return failures
