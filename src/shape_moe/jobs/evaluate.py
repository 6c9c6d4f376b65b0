"""Evaluate pruned checkpoints and selections beside the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.errors import UsageError
from shape_moe.evaluation.evaluated import Evaluation
from shape_moe.evaluation.harness import check_tasks
from shape_moe.evaluation.subjects import open_candidates
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.evaluation_run import EvaluationRun
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.session import ExampleOptions, as_example_options
from shape_moe.jobs.trace import open_trace
from shape_moe.progress import SILENT, Progress
from shape_moe.selection.selection import Selection
from shape_moe.source_files import WatchedFiles


def evaluate(
    model: str | PathLike[str],
    candidates: Sequence[str | PathLike[str] | Selection] = (),
    *,
    data: ExampleOptions | DataOptions | Data | None = None,
    options: EvaluateOptions | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Evaluation:
    """Judge the dense model, and pruned ones beside it.

    Args:
        model: the dense model, a folder or hub id.
        candidates: folders of checkpoints, selection files or selections; the latter two are judged as masks on the
            dense model, and nothing is written.
        data: held-out examples: a file (of which at most 400 records are used), or options that say more; None where
            tasks alone are asked for.
        options: see :class:`EvaluateOptions`.
        revision: branch, tag or commit of the dense model, where it is on the hub.
        device: where to run; what ``data`` says of it counts where it is :class:`ExampleOptions`.
        dtype: in which dtype; likewise.
        trust_remote_code: run the code that comes with the model instead of Transformers' own, where there is some.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do.
    """
    options = options or EvaluateOptions()
    if data is None and options.tasks is None:
        raise UsageError("Give held-out examples (--data), tasks (--tasks), or both.")
    if data is None and (options.also or options.by or options.faithfulness):
        raise UsageError("--also, --by and --faithfulness go with held-out examples: give --data.")
    tracing = None
    if data is not None:
        tracing = as_example_options(data, HELD_OUT_SAMPLES)
        if not isinstance(data, ExampleOptions):
            tracing = replace(tracing, device=device, dtype=dtype)
        if options.by is not None:
            if tracing.data.stratify not in {None, options.by}:
                raise UsageError("--by and --stratify name different fields; leave one of them out.")
            tracing = replace(tracing, data=replace(tracing.data, stratify=options.by))
        device, dtype = tracing.device, tracing.dtype
    snapshot = open_snapshot(model, revision, trust_remote_code=trust_remote_code)
    trace = open_trace(options.trace, snapshot, progress, force=True) if options.trace is not None else None
    known = open_candidates(candidates, snapshot, trace)
    if options.tasks is not None:
        check_tasks(options.tasks.names, options.tasks.engine)
    examples = (tracing.data if tracing is not None else None, options.also)
    read = [file for asked in examples if asked is not None for file in asked.files]
    read += [options.trace] if options.trace is not None else []
    watched = WatchedFiles([snapshot.path, *(given for given in candidates if not isinstance(given, Selection)), *read])
    found = EvaluationRun(snapshot, known, tracing, options, (device, dtype), progress).carry_out()
    watched.check()
    return found
