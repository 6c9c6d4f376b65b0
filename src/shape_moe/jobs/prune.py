"""The whole job: trace, select, write the smaller checkpoint, and check it against the original."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.fingerprint import fingerprint, layout_fingerprint
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.loading import free_memory
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.parts import FEWEST, Parts
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.errors import DataError, ShapeMoeError, UsageError
from shape_moe.jobs.choice import AUTO_HELD_OUT, LEAST_HELD_OUT, methods_to_try
from shape_moe.jobs.closing import commands_after
from shape_moe.jobs.judgement import Judgement, JudgementOptions, set_aside
from shape_moe.jobs.judging_examples import session_for
from shape_moe.jobs.planning import SearchPlan, held_out_tracing, plan_search
from shape_moe.jobs.prune_options import PruneOptions, check_request, complete_options, makes_curves, without_choice
from shape_moe.jobs.prune_run import (
    REFIT_FOLDER,
    PruneRun,
    judged,
    masked_canaries,
    refitted_as_asked,
    selected,
    trace_calibration,
)
from shape_moe.jobs.pruned_model import PrunedModel, describe, write_weights
from shape_moe.jobs.pruned_place import PrunedPlace, place_of
from shape_moe.jobs.select import check_options
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.jobs.sliced_imatrix import open_imatrix
from shape_moe.jobs.trace import open_trace
from shape_moe.jobs.way import check_measurable
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.canary import CanaryResult
from shape_moe.pruning.compare import file_hash
from shape_moe.pruning.down_projections import RefittedSelection
from shape_moe.pruning.refitted_tensors import check_refittable
from shape_moe.pruning.writers import what_is_left_out
from shape_moe.reporting.model_card import CardFacts
from shape_moe.reporting.opening import Opening
from shape_moe.selection.method import check_for_model
from shape_moe.selection.rules import budget_for
from shape_moe.selection.selection import Selection, open_selection
from shape_moe.serving.engines import what_loads
from shape_moe.tracing.trace import Trace
from shape_moe.units import counted, readable_size
from shape_moe.workspace import Workspace

_DISK_MARGIN = 64 * 2**20


@dataclass(frozen=True)
class PruneResult:
    """A pruned checkpoint.

    Attributes:
        path: its folder, or its GGUF file.
        selection: what it keeps.
        target: ``ragged`` or ``stock``.
        bytes_before: size of the original's tensors.
        bytes_after: size of its tensors.
        logits: comparison of logits, None where it was not made.
        logits_skipped: why it was not made.
        notes: what the user should know.
        judgement: what pruning did to the model, None where it was not judged.
        rejected: whether the model is not as good as it was required to be, and stands in ``DIR.rejected``.
        opening: the lines that terminal, model card and report open with.
        following: commands to type next.
    """

    path: Path
    selection: Selection
    target: str
    bytes_before: int
    bytes_after: int
    logits: CanaryResult | None
    logits_skipped: str | None
    notes: tuple[str, ...] = ()
    judgement: Judgement | None = None
    rejected: bool = False
    opening: Opening | None = None
    following: tuple[str, ...] = ()


def prune(
    model: str | PathLike[str],
    out: str | PathLike[str],
    options: PruneOptions | None = None,
    *,
    data: ExampleOptions | DataOptions | Data | None = None,
    keep: float | None = None,
    trace: str | PathLike[str] | None = None,
    selection: str | PathLike[str] | Selection | None = None,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> PruneResult:
    """Write a pruned checkpoint.

    Give exactly one of a calibration set (``data``), a finished ``trace`` or a finished ``selection``, and with the
    first two a keep rate (``keep``, or ``options.select`` to say more). ``prune(model, out, data="tasks.jsonl",
    keep=0.6)`` judges several methods on a part of the data and takes the best; ``options.select`` names one
    (``SelectOptions(0.6)`` is the published one). With a finished trace, ``data`` says where the examples to judge by
    come from.

    Args:
        model: a folder, a GGUF file or a hub id.
        out: folder of the pruned checkpoint; of a GGUF file the pruned file.
        options: see :class:`PruneOptions`.
        data: calibration set: a file, folder or data set, a list of dictionaries or a ``datasets.Dataset`` (of which at
            most 128 records calibrate, with a named method 25), or options that say more.
        keep: keep rate.
        trace: a trace folder; skips tracing.
        selection: a selection; skips tracing and selecting.
        revision: of a hub model.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do, and nothing stands under ``out``.
    """
    place = place_of(model, out)
    options = complete_options(options or PruneOptions(), data, keep, gguf=place.file is not None)
    check_request(options, trace, selection)
    inputs: list[str | PathLike[str]] = [p for p in (model, trace, selection) if isinstance(p, str | PathLike)]
    inputs += options.trace.data.files if options.trace else []
    inputs += [options.imatrix] if options.imatrix is not None else []
    rejects = options.judgement is not None and options.judgement.require is not None
    place.check(inputs, force=options.force, rejects=rejects)
    free_memory(options.device)
    run = PruneRun(open_snapshot(model, revision, trust_remote_code=options.trust_remote_code), options, progress)
    open_inputs(run, trace, selection)
    inputs += [run.snapshot.path, *(run.plan.data.files if run.plan else [])]
    with place.workspace(describe_job(run, trace), inputs, force=options.force, rejects=rejects) as work:
        check_disk(run, {work.path: _kept_at_most(run)})
        trace_calibration(run, work.path)
        return _write(run, selected(run, work.path), work, place)


def open_inputs(
    run: PruneRun, trace: str | PathLike[str] | None, selection: str | PathLike[str] | Selection | None
) -> None:
    """Open what enters the job, and check all that can be checked before weights are loaded."""
    snapshot, options = run.snapshot, run.options
    if selection is not None:
        run.chosen = open_selection(selection, snapshot, force=options.force)
    _check_options(run)
    if trace is not None:
        run.trace = open_trace(trace, snapshot, run.progress, force=options.force)
    options = _planned(run, options)
    if run.plan is not None:
        run.session = run.plan.session
    elif options.trace is not None and (trace is not None or selection is not None):
        run.judge = session_for(options.trace, snapshot, run.progress)
    elif options.trace is not None:
        _open_session(run, options.trace)


def _check_options(run: PruneRun) -> None:
    """Check against the model what is asked of its pruned form, and read what is to be sliced with it."""
    snapshot, options = run.snapshot, run.options
    if options.select is not None:
        moe, automatic = snapshot.moe, options.choice is not None
        check_for_model(options.select.method, moe)
        check_options(options.select, snapshot.moe_layers, moe.num_experts, moe.routing, automatic=automatic)
    run.writer.check(snapshot, run.chosen)
    gguf = isinstance(snapshot, GgufModel)
    run.progress.note(what_loads(snapshot.moe.family.model_type, run.target, gguf=gguf))
    if options.imatrix is not None:
        run.imatrix = open_imatrix(Path(options.imatrix), snapshot, run.target)
    if options.refit == "on" or isinstance(run.chosen, RefittedSelection):
        check_refittable(snapshot)


def _open_session(run: PruneRun, tracing: ExampleOptions) -> None:
    """Open what traces the calibration set, and tell its examples apart where something is judged by some of them."""
    snapshot, options = run.snapshot, run.options
    if options.select is not None and makes_curves(options.select):
        check_measurable(snapshot, tracing)
    run.parts = _told_apart(run, tracing.data)
    records = run.parts.calibration if run.parts is not None else None
    run.session = ModelSession.open(snapshot, tracing, None, run.progress, records)


def _told_apart(run: PruneRun, data: DataOptions) -> Parts | None:
    """The examples to calibrate, to choose a refit by, and to report by; None where all of them calibrate.

    Raises:
        DataError: when too few are left to choose by, and a refit must be chosen.
    """
    judging = run.options.judgement
    if run.may_refit:
        try:
            return set_aside(
                data,
                judging or JudgementOptions(examples=FEWEST),
                choice=AUTO_HELD_OUT,
                give_up=run.chooses,
                progress=run.progress,
            )
        except DataError:
            if run.options.refit == "on":
                raise
    return set_aside(data, judging, give_up=run.chooses, progress=run.progress) if judging is not None else None


def _write(run: PruneRun, selection: Selection, work: Workspace, place: PrunedPlace) -> PruneResult:
    """The phases that follow: refit, judge, ask the masked original, write, ask the result the same, describe."""
    artifacts = work.path / "shape"
    left_out = what_is_left_out(run.snapshot)
    selection = refitted_as_asked(run, selection, work.path / REFIT_FOLDER)
    selection.save(artifacts / "selection.json")
    run.notes += [*selection.warnings, *left_out]
    judgement = judged(run, [selection], work.path)[0] if run.options.judgement is not None else None
    canaries, skipped = masked_canaries(run, [selection])
    made = PrunedModel(selection, judgement, canaries[0] if canaries else None, skipped, left_out, place.file)
    size, hashes, logits = write_weights(run, made, work.path)
    shutil.rmtree(work.path / REFIT_FOLDER, ignore_errors=True)
    facts = made.facts(run, size)
    describe(run, made, work.path, facts, hashes)
    return result_of(run, made, facts, logits, place.complete(work, rejected=made.rejected(run)), run.notes)


def result_of(
    run: PruneRun,
    made: PrunedModel,
    facts: CardFacts,
    logits: CanaryResult | None,
    path: Path,
    notes: Sequence[str],
) -> PruneResult:
    """What there is to say of a model once it has its name.

    Args:
        run: the job.
        made: the model.
        facts: what its card tells.
        logits: the comparison of its logits, None where there was none.
        path: where it lies.
        notes: what the user should know.
    """
    rejected = made.rejected(run)
    return PruneResult(
        path,
        made.selection,
        run.target,
        facts.bytes_before,
        facts.bytes_after,
        logits,
        made.logits_skipped,
        tuple(notes),
        made.judgement,
        rejected,
        facts.opening,
        () if rejected else tuple(commands_after(facts, path)),
    )


def _planned(run: PruneRun, options: PruneOptions) -> PruneOptions:
    """The options, once it is known whether candidates can be judged; where they cannot, with a recommended method.

    Raises:
        ShapeMoeError: where candidates have to be judged and cannot.
    """
    choice = options.choice
    if choice is not None and choice.limit is None and (choice.effort == "fast" or _keeps_all(options)):
        run.options = _fixed(run, options)
        return run.options
    try:
        run.plan = _plan_choice(run.snapshot, options, run.trace, run.progress)
        if run.plan is None or choice is None or choice.insist or choice.limit is not None:
            return options
        reason = _too_few(run.plan)
    except (DataError, UsageError) as error:
        if choice is None or choice.insist or choice.limit is not None:
            raise
        reason = str(error)
    if reason is None:
        return options
    run.plan, run.options = None, _fixed(run, options)
    assert run.options.select is not None
    run.notes.append(
        f"Candidates were not compared, and the recommended method was taken ({run.options.select.method}): {reason}"
    )
    return run.options


def _keeps_all(options: PruneOptions) -> bool:
    return options.select is not None and options.select.keep >= 1


def _fixed(run: PruneRun, options: PruneOptions) -> PruneOptions:
    held = run.trace.statistics if run.trace is not None else None
    return without_choice(options, held, run.snapshot.moe.top_k)


def _too_few(plan: SearchPlan) -> str | None:
    """Why the held-out examples tell no candidates apart, None where they do."""
    counts = Counter(record.group or "" for record in plan.held_out.records)
    name, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    if count >= LEAST_HELD_OUT:
        return None
    of_class = f" of class {name}" if name else ""
    return (
        f"only {counted(count, 'example')}{of_class} would be left to judge them by, and {LEAST_HELD_OUT} are needed."
    )


def _plan_choice(
    snapshot: Snapshot, options: PruneOptions, trace: Trace | None, progress: Progress
) -> SearchPlan | None:
    """Which examples calibrate and which judge candidates, None where nothing is left to choose."""
    choice, select = options.choice, options.select
    if choice is None or select is None:
        return None
    seed = select.scoring.seed
    tracing = held_out_tracing(options.trace, trace, choice.held_out, seed)
    tracing = replace(tracing, device=options.device, dtype=options.dtype, stream=options.stream)
    plan = plan_search(
        snapshot,
        tracing,
        trace,
        choice.held_out,
        choice.samples,
        seed,
        progress,
        options.judgement,
        give_up=choice.limit is None,
    )
    if choice.limit is not None:
        held = trace.statistics if trace is not None else plan.session.engine.statistics()
        methods = methods_to_try(select.method, choice, snapshot.moe.top_k, held, snapshot.moe)
        choice.limit.check_examples(len(plan.held_out.records), len(methods))
    return plan


def describe_job(run: PruneRun, trace: str | PathLike[str] | None) -> Mapping[str, Any]:
    """What decides the result, by its content: the model, the artifacts that enter, and the options."""
    description = asdict(run.options)
    description.pop("force")
    files = sorted(path for path in Path(trace).rglob("*") if path.is_file()) if trace else []
    return {
        "verb": "prune",
        "model": fingerprint(run.snapshot),
        "layout": layout_fingerprint(run.snapshot),
        "session": run.session.job() if run.session else None,
        "held_out": run.plan.held_out_job() if run.plan else None,
        "traced": [file_hash(file) for file in files],
        "selection": run.chosen.to_document() if run.chosen else None,
        **description,
    }


def check_disk(run: PruneRun, needs: Mapping[Path, int]) -> None:
    """Refuse a job whose result would not fit the disk, less what an interrupted run has written already.

    Args:
        run: the job.
        needs: how many experts are kept over all layers, by the folder that each model is written into.

    Raises:
        ShapeMoeError: saying what is needed and what is free.
    """
    there = [run.writer.bytes_there(folder) if folder.is_dir() else 0 for folder in needs]
    whole = sum(run.writer.bytes_for(run.snapshot, kept) for kept in needs.values())
    needed = whole * (1 + run.may_refit) + _DISK_MARGIN - sum(there)  # three candidates of a third of every expert
    place = next(iter(needs))
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        what = "The pruned checkpoint needs" if len(needs) == 1 else f"The {len(needs)} pruned models need"
        raise ShapeMoeError(
            f"{what} about {readable_size(needed)}, but only {readable_size(free)} are free on "
            f"the disk of {place.parent}; free some space or choose another --output."
        )


def _kept_at_most(run: PruneRun) -> int:
    """Experts that are kept over all layers, as far as that is known before."""
    total = run.snapshot.moe.num_experts * len(run.snapshot.moe_layers)
    select = run.options.select
    return run.chosen.kept if run.chosen is not None else budget_for(select.keep, total) if select else total
