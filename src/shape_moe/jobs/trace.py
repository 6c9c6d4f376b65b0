"""Trace a model over a calibration set: from files on disk to a trace on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.fingerprint import UNVERIFIED, layout_fingerprint
from shape_moe.architectures.same_routers import check_same_model
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.example_maker import ANSWERS_FILE
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.errors import FingerprintError
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions, ModelSession, as_example_options
from shape_moe.progress import SILENT, Progress
from shape_moe.tracing.trace import Trace, load_trace, merge_traces
from shape_moe.tracing.whole_model import remove_unfinished
from shape_moe.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def trace(
    model: str | PathLike[str] | PreTrainedModel,
    data: ExampleOptions | DataOptions | Data,
    out: str | PathLike[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Trace:
    """Trace a model.

    Args:
        model: a folder, a hub id, or a live model (then ``tokenizer`` is needed, and the trace is unverified).
        data: the calibration set: a file, folder or data set, a list of dictionaries or a ``datasets.Dataset`` (of
            which at most 128 records are used), or options that say more.
        out: folder for the trace; None keeps it in memory.
        tokenizer: the tokenizer of a live model.
        revision: branch, tag or commit of a hub model.
        force: replace an existing trace at ``out``.
        progress: where to show progress.

    Under ``torchrun`` the first process writes the trace; the others get back what they have made of it.

    Raises:
        ShapeMoeError: when something is wrong with the model, the data or the options; the message says what to do.
    """
    options = as_example_options(data, DEFAULT_SAMPLES)
    session = ModelSession.open(model, options, tokenizer, progress, revision=revision)
    if out is None or not session.ranks.leads:
        return session.trace(None)
    inputs: list[str | PathLike[str]] = [*options.data.files, *([session.snapshot.path] if session.snapshot else [])]
    with Workspace(out, {"verb": "trace", **session.job()}, force=force, inputs=inputs) as work:
        # trace.json is written last; other processes wait for this one to begin
        if session.ranks.count > 1 or not (work.path / "trace.json").is_file():
            session.trace(work.path).save(work.path)
        remove_unfinished(work.path)
        (work.path / ANSWERS_FILE).unlink(missing_ok=True)
        return load_trace(work.complete())


def merge(
    traces: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    pool: bool = False,
    force: bool = False,
) -> Trace:
    """Put traces of one model together and write the result.

    Args:
        traces: their folders.
        out: folder of the result.
        weights: one for each, all 1 when left out.
        pool: they are parts of one data set; else each data set becomes a class of its own.
        force: replace an existing result.

    Raises:
        FingerprintError: when they are of different models.
        UsageError: when weights do not fit, or the output exists.
    """
    merged = merge_traces([load_trace(path) for path in traces], weights, pool=pool)
    job = {"verb": "merge", "traces": [str(path) for path in traces], "weights": list(weights or []), "pool": pool}
    with Workspace(out, job, force=force, inputs=traces) as work:
        merged.save(work.path)
        return load_trace(work.complete())


def open_trace(given: str | PathLike[str], snapshot: Snapshot, progress: Progress, *, force: bool = False) -> Trace:
    """Read a finished trace of a model.

    Args:
        given: its folder.
        snapshot: the model.
        progress: where to note that the trace was made from another copy of the model.
        force: accept a trace of unknown origin, or of weights that have changed since.

    Raises:
        FingerprintError: when it was made from another model, or this one's weights have changed since.
        CheckpointError: when it cannot be read.
    """
    found = load_trace(given)
    info = found.info
    told = check_same_model(info, snapshot, f"The trace {given}", force=force)
    if told is not None:
        progress.note(told)
        return found
    if found.info.layout_fingerprint not in (UNVERIFIED, layout_fingerprint(snapshot)):
        progress.note("The trace was made from another copy of this model (other names, dtypes or shapes of tensors).")
    _check_weights(found, f"The trace {given}", snapshot, progress, force=force)
    for remark in found.remarks:
        progress.note(remark)
    return found


def _check_weights(found: Trace, what: str, snapshot: Snapshot, progress: Progress, *, force: bool) -> None:
    """Refuse a trace of other weights than those at hand; routers were compared already."""
    known = found.info.traced_files
    if known is None:
        return
    if (changed := known.changed(snapshot.path)) is None and (other := known.difference_of_copy(snapshot.path)):
        changed = f"{other} holds other weights than the traced one"
    if changed is not None:
        message = f"{what} no longer fits {snapshot.name}: {changed}"
        if not force:
            raise FingerprintError(f"{message}. Trace the model anew, or use --force if the change cannot matter.")
        progress.note(f"{message}; it is used all the same (--force).")
    elif (rest := known.uncompared(snapshot.path)) is not None:
        progress.note(f"The trace was made from another copy of this model: {rest}")


def kept_trace(session: Callable[[], ModelSession], folder: Path) -> Trace:
    """The trace of a larger job: found where an interrupted run left it, or made now and kept for the next.

    Args:
        session: gives what to trace; not called where the trace is there.
        folder: where the finished trace lies; an unfinished one grows beside it and goes when it is complete.

    Raises:
        ShapeMoeError: when the model cannot be traced.
    """
    unfinished, complete = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.new")
    if not (folder / "trace.json").is_file():
        unfinished.mkdir(parents=True, exist_ok=True)
        session().run(unfinished).save(complete)
        complete.rename(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    return load_trace(folder)
