"""The whole job at several keep rates: one trace, one judgement, and a series of models, each within the larger one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from pathlib import Path

from shape_moe.architectures.loading import free_memory
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.jobs.prune import PruneResult, check_disk, describe_job, open_inputs, result_of
from shape_moe.jobs.prune_options import PruneOptions, check_request, complete_options
from shape_moe.jobs.prune_run import (
    REFIT_FOLDER,
    PruneRun,
    judged,
    masked_canaries,
    refitted_as_asked,
    selected,
    trace_calibration,
    with_curves,
)
from shape_moe.jobs.pruned_model import PrunedModel, describe, write_weights
from shape_moe.jobs.pruned_place import SeriesPlace, series_place
from shape_moe.jobs.select import check_options
from shape_moe.jobs.session import ExampleOptions
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.canary import CanaryResult
from shape_moe.pruning.writers import what_is_left_out
from shape_moe.reporting.opening import full_method, short_name
from shape_moe.reporting.series import Series, SeriesModel
from shape_moe.selection.rules import budget_for
from shape_moe.selection.select import SelectOptions, TraceSelector, check_series
from shape_moe.selection.selection import Selection
from shape_moe.units import counted
from shape_moe.workspace import Workspace


@dataclass(frozen=True)
class SeriesResult:
    """A series of pruned models.

    Attributes:
        path: the folder that holds them.
        models: what there is to say of each, largest first.
        series: the table.
        notes: what the user should know.
    """

    path: Path
    models: tuple[PruneResult, ...]
    series: Series
    notes: tuple[str, ...] = ()

    @property
    def rejected(self) -> bool:
        """Whether one of them is not as good as it was required to be."""
        return any(model.rejected for model in self.models)


def prune_series(
    model: str | PathLike[str],
    out: str | PathLike[str],
    keep: Sequence[float],
    options: PruneOptions | None = None,
    *,
    data: ExampleOptions | DataOptions | Data | None = None,
    trace: str | PathLike[str] | None = None,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> SeriesResult:
    """Write a nested series of pruned models: of one trace, by one method, each kept set inside the next larger one.

    ``prune_series(model, "small", [0.85, 0.75, 0.6], data="tasks.jsonl")`` makes the folder ``small`` with the models
    ``small-0.85``, ``small-0.75`` and ``small-0.6``; of a GGUF file the files ``small-0.85.gguf`` and so on, each with
    a folder ``small-0.85.shape`` beside it. The largest is what :func:`shape_moe.prune` makes at its keep rate. They
    are judged by the same examples, and every card has the table of all. The folder gets its name when all are there.

    Args:
        model: a folder, a GGUF file or a hub id.
        out: the folder of the series; a name that ends in ``.gguf`` stands for the one without.
        keep: the keep rates. Where scorer or method are left to the tool (``options.choice``), they are chosen at the
            smallest.
        options: see :class:`PruneOptions`; the keep rate of its ``select`` is overruled.
        data: calibration set.
        trace: a trace folder; skips tracing.
        revision: of a hub model.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do, and nothing stands under ``out``.
    """
    place = series_place(model, out, keep)
    smallest = min(keep, default=1.0)
    options = complete_options(options or PruneOptions(), data, None, gguf=place.gguf)
    if options.select is None:
        options = complete_options(options, None, smallest, gguf=place.gguf)
    assert options.select is not None
    asked = replace(options.select, keep=smallest)
    check_series(asked, keep)
    options = replace(options, select=asked)
    check_request(options, trace, None)
    inputs: list[str | PathLike[str]] = [path for path in (model, trace, options.imatrix) if path is not None]
    inputs += options.trace.data.files if options.trace else []
    place.check(inputs, force=options.force)
    free_memory(options.device)
    run = PruneRun(open_snapshot(model, revision, trust_remote_code=options.trust_remote_code), options, progress)
    open_inputs(run, trace, None)
    _check_each(run, asked, keep)
    inputs += [run.snapshot.path, *(run.plan.data.files if run.plan else [])]
    job = {**describe_job(run, trace), "verb": "prune series", "series": sorted(keep, reverse=True)}
    with Workspace(place.folder, job, force=options.force, inputs=inputs) as work:
        total = run.snapshot.moe.num_experts * len(run.snapshot.moe_layers)
        check_disk(run, {place.inside(rate, work.path): budget_for(rate, total) for rate in place.keeps})
        return _carry_out(run, work, place)


def _check_each(run: PruneRun, asked: SelectOptions, keeps: Sequence[float]) -> None:
    """Whether every budget can be met, before anything is traced."""
    moe = run.snapshot.moe
    for rate in keeps:
        each = replace(asked, keep=rate)
        check_options(each, run.snapshot.moe_layers, moe.num_experts, moe.routing, automatic=run.chooses)


def _carry_out(run: PruneRun, work: Workspace, place: SeriesPlace) -> SeriesResult:
    """The phases: trace, select all, judge all, ask the masked original, write and check each, describe."""
    trace_calibration(run, work.path)
    refits = work.path / REFIT_FOLDER
    selections = [
        refitted_as_asked(run, selection, refits / f"{rate:g}")
        for rate, selection in zip(place.keeps, _selections(run, work.path, place), strict=True)
    ]
    left_out = what_is_left_out(run.snapshot)
    run.notes += [*_said_of_all(selections), *left_out]
    judgements = judged(run, selections, work.path) if run.options.judgement is not None else [None] * len(selections)
    answers, skipped = masked_canaries(run, selections)
    canaries = answers if answers is not None else [None] * len(selections)
    made = [
        PrunedModel(selection, judgement, canary, skipped, left_out, place.file(rate))
        for rate, selection, judgement, canary in zip(place.keeps, selections, judgements, canaries, strict=True)
    ]
    written = [_write(run, each, place, rate, work.path) for rate, each in zip(place.keeps, made, strict=True)]
    shutil.rmtree(refits, ignore_errors=True)
    series = Series(tuple(_row(run, each, place, size) for each, (size, _, _) in zip(made, written, strict=True)))
    results = []
    for rate, each, (size, hashes, logits) in zip(place.keeps, made, written, strict=True):
        facts = each.facts(run, size, series)
        describe(run, each, place.inside(rate, work.path), facts, hashes)
        path = place.folder / place.name(rate, rejected=each.rejected(run))
        results.append(result_of(run, each, facts, logits, path, each.selection.warnings))
    samples = run.trace.info.examples if run.trace is not None else None
    method = full_method(selections[0], samples)
    title = f"{short_name(run.snapshot.name)}, pruned to {len(made)} keep rates"
    told = {"model": run.snapshot.name, "method": str(selections[0].method)}
    series.write(work.path, title, [f"Method: {method}.", *run.notes], told)
    (work.path / "shape" / "selection.json").unlink(missing_ok=True)  # what a method was chosen by
    for rate, each in zip(place.keeps, made, strict=True):
        place.rename(rate, work.path, rejected=each.rejected(run))
    return SeriesResult(work.complete(), tuple(results), series, tuple(run.notes))


def _row(run: PruneRun, made: PrunedModel, place: SeriesPlace, size: int) -> SeriesModel:
    """One model's row of the table."""
    chosen, rejected = made.selection, made.rejected(run)
    name = place.name(chosen.keep_asked, rejected=rejected)
    verdict = made.judgement.verdict if made.judgement is not None else None
    whole = run.snapshot.total_bytes
    return SeriesModel(name, chosen.keep_asked, chosen.kept, chosen.total, size, whole, verdict, rejected)


def _selections(run: PruneRun, work: Path, place: SeriesPlace) -> list[Selection]:
    """The selections, largest first; where the method is left to the tool, it is chosen at the smallest keep rate."""
    assert run.trace is not None
    assert run.options.select is not None
    asked, chosen = run.options.select, None
    if run.plan is not None and run.options.choice is not None:
        chosen = selected(run, work)
        rounding = asked.allow_rounding or chosen.method.equal_counts
        asked = replace(asked, method=chosen.method, allow_rounding=rounding)
    asked = with_curves(run, asked, work)
    found = TraceSelector(run.trace, asked.scoring).series(asked, place.keeps)
    if chosen is not None and run.plan is not None:
        found = [run.plan.told(replace(selection, choice=chosen.choice)) for selection in found]
    for larger, smaller in pairwise(found):
        if larger.layers == smaller.layers:
            run.notes.append(
                f"Keep rates {larger.keep_asked:g} and {smaller.keep_asked:g} keep the same experts: no budget between "
                "them can be met."
            )
    return found


def _said_of_all(selections: Sequence[Selection]) -> list[str]:
    """Warnings of the selections, each once, with the keep rates that it is about where that is not all of them."""
    rates: dict[str, list[str]] = {}
    for selection in selections:
        for warning in selection.warnings:
            rates.setdefault(warning, []).append(f"{selection.keep_asked:g}")
    return [
        warning if len(of) == len(selections) else f"Keep {', '.join(of)}: {warning}" for warning, of in rates.items()
    ]


def _write(
    run: PruneRun, made: PrunedModel, place: SeriesPlace, rate: float, work: Path
) -> tuple[int, dict[str, str], CanaryResult | None]:
    """Write one model into its folder within the work, with the trace that all were made from."""
    folder = place.inside(rate, work)
    place.take_back(rate, work)
    folder.mkdir(exist_ok=True)
    trace, own = work / "shape" / "trace", folder / "shape" / "trace"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(trace, own, copy_function=_link_or_copy)
    run.progress.note(f"Keep {rate:g}: {counted(made.selection.kept, 'expert')} of {made.selection.total:,}.")
    return write_weights(run, made, folder)


def _link_or_copy(source: str, target: str) -> str:
    """One file under two names, where the disk can: traces are written once and only read."""
    try:
        os.link(source, target)
    except OSError:
        return str(shutil.copy2(source, target))
    return target
