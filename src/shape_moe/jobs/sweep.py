"""Sweep keep rates and ways to choose: one trace, one loaded model, masks; nothing is written but the answer."""

from __future__ import annotations

from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path

from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.example_maker import ANSWERS_FILE
from shape_moe.calibration.records import DataOptions
from shape_moe.jobs.planning import Plan, held_out_tracing, plan_search
from shape_moe.jobs.search import POINTS_FILE, Search, SweepOptions, SweepResult, check_examples
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import kept_trace, open_trace
from shape_moe.progress import SILENT, Progress
from shape_moe.workspace import Workspace, write_json


def sweep(
    model: str | PathLike[str],
    options: SweepOptions | None = None,
    out: str | PathLike[str] | None = None,
    *,
    data: ExampleOptions | DataOptions | str | PathLike[str] | None = None,
    trace: str | PathLike[str] | None = None,
    held_out: DataOptions | str | PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = SILENT,
) -> SweepResult:
    """Find out which keep rate is safe.

    Args:
        model: a folder or hub id.
        options: see :class:`SweepOptions`.
        out: folder for ``sweep.json``, the recommended selection (``recommended.json``) and the trace; None keeps the
            answer in memory. An interrupted sweep goes on from its last point.
        data: examples; without ``trace`` and ``held_out`` they are split into calibration and held-out ones. With a
            trace, what is to be known about tokens, answers and the device.
        trace: a finished trace.
        held_out: examples to judge by; those whose prompts calibration has seen are left out.
        device: where to run; what ``data`` says of it counts where it is :class:`ExampleOptions`.
        dtype: in which dtype; likewise.
        force: replace an earlier result.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do.
    """
    options = options or SweepOptions()
    snapshot, seed = open_snapshot(model), options.scoring.seed
    traced = open_trace(trace, snapshot, progress, force=force) if trace is not None else None
    judged_by = held_out if isinstance(held_out, DataOptions | None) else DataOptions(str(held_out), seed=seed)
    tracing = held_out_tracing(data, traced, judged_by, seed)
    if not isinstance(data, ExampleOptions):
        tracing = replace(tracing, device=device, dtype=dtype)
    plan = plan_search(snapshot, tracing, traced, judged_by, options.held_out, seed, progress)
    check_examples(plan, options.limit, len(options.combinations()))
    if out is None:
        return _searched(snapshot, options, plan, progress, None)
    read = (model, snapshot.path, trace, tracing.data.source, plan.data.source)
    inputs = [path for path in read if path is not None]
    job = {
        "verb": "sweep",
        "options": asdict(options),
        "trace": plan.trace.info.source.get("content_hash") if plan.trace else None,
        "held_out": plan.held_out_job(),
        **plan.session.job(),
    }
    with Workspace(out, job, force=force, inputs=inputs) as work:
        result = _searched(snapshot, options, plan, progress, work.path)
        _write(result, work.path)
        work.complete()
    return result


def _searched(
    snapshot: Snapshot, options: SweepOptions, plan: Plan, progress: Progress, folder: Path | None
) -> SweepResult:
    """Trace, or find the trace that an interrupted sweep left in the folder; then judge and recommend."""
    trace = plan.trace
    if trace is None:
        trace = plan.session.run(None) if folder is None else kept_trace(lambda: plan.session, folder / "trace")
    search = Search(snapshot, plan, trace, options, options.combinations(), progress, folder)
    try:
        return search.run()
    finally:
        search.judge.close()


def _write(result: SweepResult, folder: Path) -> None:
    """Write the answer, and remove what only an unfinished sweep needs."""
    write_json(folder / "sweep.json", result.document)
    if result.chosen is not None:
        result.chosen.selection.save(folder / "recommended.json")
    for name in (POINTS_FILE, ANSWERS_FILE):
        (folder / name).unlink(missing_ok=True)
