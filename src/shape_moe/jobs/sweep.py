"""Sweep keep rates and ways to choose: one trace, one loaded model, masks; nothing is written but the answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.fingerprint import check_fingerprint, fingerprint
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.records import DataOptions, load_records, prompt_hash
from shape_moe.calibration.split import split_records
from shape_moe.errors import UsageError
from shape_moe.jobs.held_out import fresh_records, known_prompts
from shape_moe.jobs.options import DEFAULT_SAMPLES, TraceOptions, as_trace_options
from shape_moe.jobs.search import Plan, Search, SweepOptions, SweepResult
from shape_moe.jobs.session import TraceSession
from shape_moe.progress import SILENT, Progress
from shape_moe.tracing.trace import Trace, load_trace
from shape_moe.workspace import Workspace, write_json


def sweep(
    model: str | PathLike[str],
    options: SweepOptions | None = None,
    out: str | PathLike[str] | None = None,
    *,
    data: TraceOptions | DataOptions | str | PathLike[str] | None = None,
    trace: str | PathLike[str] | None = None,
    held_out: DataOptions | str | PathLike[str] | None = None,
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
        force: replace an earlier result.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do.
    """
    options = options or SweepOptions()
    tracing = _trace_options(data, trace, held_out)
    snapshot = open_snapshot(model)
    plan = _plan(snapshot, options, tracing, trace, held_out, progress)
    if out is None:
        return _Sweep(snapshot, options, plan, progress, None).run()
    inputs = [path for path in (model, trace, tracing.data.source) if path is not None]
    job = {
        "verb": "sweep",
        "options": asdict(options),
        "trace": plan.trace.info.source.get("content_hash") if plan.trace else None,
        "held_out": [record.index for record in plan.records],
        **plan.session.job(),
    }
    with Workspace(out, job, force=force, inputs=inputs) as work:
        result = _Sweep(snapshot, options, plan, progress, work.path).run()
        _write(result, work.path)
        work.complete()
    return result


def _trace_options(
    data: TraceOptions | DataOptions | str | PathLike[str] | None,
    trace: str | PathLike[str] | None,
    held_out: DataOptions | str | PathLike[str] | None,
) -> TraceOptions:
    if data is not None:
        return as_trace_options(data, DEFAULT_SAMPLES)
    if trace is None:
        raise UsageError("Give examples (--data), a trace (--trace), or both.")
    if isinstance(held_out, DataOptions):
        return TraceOptions(held_out)
    if held_out is not None:
        return TraceOptions(DataOptions(str(held_out)))
    source = load_trace(trace).info.source
    return TraceOptions(DataOptions(str(source.get("data")), source.get("split") or "train", source.get("subset")))


def _plan(
    snapshot: Snapshot,
    options: SweepOptions,
    tracing: TraceOptions,
    given: str | PathLike[str] | None,
    held_out: DataOptions | str | PathLike[str] | None,
    progress: Progress,
) -> Plan:
    """Decide which examples calibrate and which judge."""
    other = held_out if isinstance(held_out, DataOptions) or held_out is None else DataOptions(str(held_out))
    if given is None and other is None:
        return split_plan(snapshot, tracing, options.held_out, options.scoring.seed, progress)
    if given is not None:
        traced = load_trace(given)
        check_fingerprint(traced.info.fingerprint, fingerprint(snapshot), f"The trace {given}")
        known, session_records = known_prompts(traced), None
        if not known:
            progress.note("The trace does not name its examples, so held-out ones could not be told from them.")
    else:
        traced = None
        session_records = load_records(tracing.data)
        known = frozenset(prompt_hash(record) for record in session_records)
    source = other or tracing.data
    records, seen = fresh_records(source, known, options.held_out)
    session = TraceSession.open(snapshot, tracing, None, progress, records if traced else session_records)
    sentence = f"{len(records)} held-out examples of {source.source}"
    if seen:
        sentence += f"; {seen} more were left out, because calibration has seen their prompts"
        if other is not None:
            progress.note(f"{seen} examples of {source.source} are in the calibration set as well and were left out.")
    return Plan(session, traced, records, source, sentence)


def split_plan(snapshot: Snapshot, tracing: TraceOptions, held_out: int, seed: int, progress: Progress) -> Plan:
    """Split one source into calibration and held-out examples.

    Raises:
        DataError: when it holds too few.
    """
    wanted = tracing.data.samples or DEFAULT_SAMPLES
    pool = load_records(replace(tracing.data, samples=wanted + held_out))
    split = split_records(pool, wanted, held_out, seed=seed)
    session = TraceSession.open(snapshot, tracing, None, progress, split.calibration)
    return Plan(session, None, split.held_out, tracing.data, split.sentence)


class _Sweep:
    """One sweep on its way."""

    def __init__(
        self, snapshot: Snapshot, options: SweepOptions, plan: Plan, progress: Progress, folder: Path | None
    ) -> None:
        self.snapshot, self.options, self.plan, self.progress, self.folder = snapshot, options, plan, progress, folder

    def run(self) -> SweepResult:
        trace = self.plan.trace or self._traced()
        search = Search(self.snapshot, self.plan, trace, self.options, self.progress, self.folder)
        try:
            return search.run()
        finally:
            search.judge.close()

    def _traced(self) -> Trace:
        """The calibration trace: made now, or found where an interrupted sweep left it."""
        if self.folder is None:
            return self.plan.session.run(None)
        kept, unfinished = self.folder / "trace", self.folder / "trace.partial"
        if not (kept / "trace.json").is_file():
            unfinished.mkdir(exist_ok=True)
            self.plan.session.run(unfinished).save(self.folder / "trace.new")
            (self.folder / "trace.new").rename(kept)
        return load_trace(kept)


def _write(result: SweepResult, folder: Path) -> None:
    """Write the answer, and remove what only an unfinished sweep needs."""
    write_json(folder / "sweep.json", result.document)
    if result.chosen is not None:
        result.chosen.selection.save(folder / "recommended.json")
    for name in ("points.jsonl", "answers.json"):
        (folder / name).unlink(missing_ok=True)
    _remove_partial(folder)


def _remove_partial(folder: Path) -> None:
    shutil.rmtree(folder / "trace.partial", ignore_errors=True)


def read_sweep(source: str | PathLike[str]) -> Mapping[str, Any]:
    """Read the ``sweep.json`` of a sweep's folder.

    Raises:
        UsageError: when there is none.
    """
    file = Path(source) / "sweep.json" if Path(source).is_dir() else Path(source)
    if not file.is_file():
        raise UsageError(f"{source} is not the result of a sweep: it has no sweep.json.")
    found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
