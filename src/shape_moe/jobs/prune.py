"""The whole job: trace, select, write the smaller checkpoint, and check it against the original."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.fingerprint import fingerprint, layout_fingerprint
from shape_moe.architectures.loading import free_memory, load_model, loaded_bytes, release_memory, why_not_loadable
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.parts import Parts
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import CheckpointError, ShapeMoeError, UsageError
from shape_moe.jobs.auto import ChoiceOptions, auto_select, methods_to_try
from shape_moe.jobs.judgement import (
    Judgement,
    JudgementOptions,
    judge_selection,
    no_judgement,
    session_of_trace,
    set_aside,
    unseen_parts,
)
from shape_moe.jobs.planning import SearchPlan, held_out_tracing, plan_search
from shape_moe.jobs.select import as_select_options, check_options
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions, ModelSession, as_example_options, load_original
from shape_moe.jobs.trace import kept_trace, open_trace
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.canary import Canary, CanaryResult, compare_canary, random_tokens, record_canary
from shape_moe.pruning.checkpoint import ShardPlan, plan_checkpoint, write_index
from shape_moe.pruning.compare import file_hash
from shape_moe.pruning.masks import masked
from shape_moe.pruning.model_config import pruned_config
from shape_moe.pruning.shards import write_compared
from shape_moe.reporting.model_card import CardFacts, write_card
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection, load_selection, open_selection, whole_selection
from shape_moe.serving.bundle import copy_code, copy_root_files
from shape_moe.serving.manifest import write_manifest
from shape_moe.tracing.statistics import STATISTICS
from shape_moe.tracing.trace import Trace
from shape_moe.workspace import Workspace, check_output, write_json

PAPER_SAMPLES = 25
"""Calibration examples of the published experiments."""
_DISK_MARGIN = 64 * 2**20
_REJECTED = ".rejected"
_NO_EXAMPLES = "There are no examples that the model was not made from."


@dataclass(frozen=True)
class PruneOptions:
    """What is asked of a pruned checkpoint.

    Attributes:
        select: how experts are chosen; None when a finished selection is given.
        trace: the calibration set and how to trace; None when a trace or a selection is given. Its device and dtype
            are overruled by those below.
        device: where to trace and to compare logits.
        dtype: in which dtype.
        choice: how candidates are judged where scorer or keep rate are left to the tool, None where they are not.
        judgement: how the pruned model is judged, None for not at all.
        check_logits: compare the pruned model's logits with the masked original's, where both fit in memory.
        force: replace an existing result, accept artifacts of unknown origin.
    """

    select: SelectOptions | None = None
    trace: ExampleOptions | None = None
    device: str = "auto"
    dtype: str = "auto"
    choice: ChoiceOptions | None = None
    judgement: JudgementOptions | None = field(default_factory=JudgementOptions)
    check_logits: bool = True
    force: bool = False


@dataclass(frozen=True)
class PruneResult:
    """A pruned checkpoint.

    Attributes:
        path: its folder.
        selection: what it keeps.
        target: ``ragged`` or ``stock``.
        bytes_before: size of the original's tensors.
        bytes_after: size of its tensors.
        logits: comparison of logits, None where it was not made.
        logits_skipped: why it was not made.
        notes: what the user should know.
        judgement: what pruning did to the model, None where it was not judged.
        rejected: whether the model is not as good as it was required to be, and stands in ``DIR.rejected``.
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


@dataclass
class _Run:
    """State of one pruning job on its way through the phases."""

    snapshot: Snapshot
    options: PruneOptions
    work: Path
    progress: Progress
    session: ModelSession | None = None
    trace: Trace | None = None
    plan: SearchPlan | None = None
    parts: Parts | None = None
    logits_skipped: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def artifacts(self) -> Path:
        return self.work / "shape"


def prune(
    model: str | PathLike[str],
    out: str | PathLike[str],
    options: PruneOptions | None = None,
    *,
    data: ExampleOptions | DataOptions | str | PathLike[str] | None = None,
    keep: float | None = None,
    trace: str | PathLike[str] | None = None,
    selection: str | PathLike[str] | Selection | None = None,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> PruneResult:
    """Write a pruned checkpoint.

    Give exactly one of a calibration set (``data``), a finished ``trace`` or a finished ``selection``, and with the
    first two a keep rate (``keep``, or ``options.select`` to say more). ``prune(model, out, data="tasks.jsonl",
    keep=0.6)`` is the published method. With scorer ``auto`` or a limit (``options.choice``) candidates are judged on
    held-out examples first; with a finished trace, ``data`` says where those come from.

    Args:
        model: a folder or hub id.
        out: folder of the pruned checkpoint.
        options: see :class:`PruneOptions`.
        data: calibration set: a file (of which at most 25 records are used), or options that say more.
        keep: keep rate.
        trace: a trace folder; skips tracing.
        selection: a selection; skips tracing and selecting.
        revision: of a hub model.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do, and nothing stands under ``out``.
    """
    options = _complete_options(options or PruneOptions(), data, keep)
    if options.choice is not None:
        if selection is not None or (options.trace is None and trace is None):
            raise UsageError("Scorer auto and limits choose on held-out examples: give data (--data) or a trace.")
    elif sum(given is not None for given in (options.trace, trace, selection)) != 1:
        raise UsageError(
            "Give exactly one of: calibration data (--data), a trace (--trace), a selection (--selection)."
        )
    if (options.select is None) != (selection is not None):
        raise UsageError("Give a keep rate (--keep or --fit) with data or a trace, and none with a selection.")
    inputs: list[str | PathLike[str]] = [p for p in (model, trace, selection) if isinstance(p, str | PathLike)]
    inputs += [options.trace.data.source] if options.trace else []
    check_output(Path(out).absolute(), force=options.force, inputs=inputs)
    if options.judgement is not None and options.judgement.require is not None:
        check_output(_rejected(out), force=options.force)
    free_memory(options.device)
    snapshot = open_snapshot(model, revision)
    chosen = open_selection(selection, snapshot, force=options.force) if selection is not None else None
    if options.select is not None:
        moe, automatic = snapshot.moe, options.choice is not None
        check_options(options.select, snapshot.moe_layers, moe.num_experts, moe.routing, automatic=automatic)
    target = _target(options, chosen)
    _check_writable(snapshot, chosen, target)
    traced = open_trace(trace, snapshot, progress, force=options.force) if trace is not None else None
    plan = _plan_choice(snapshot, options, traced, progress)
    session, parts = plan.session if plan else None, None
    if session is None and options.trace is not None:
        parts = _parts(options)
        records = parts.calibration if parts else None
        session = ModelSession.open(snapshot, options.trace, None, progress, records)
    inputs += [snapshot.path, *([plan.data.source] if plan else [])]
    job = _job(snapshot, options, session, trace, chosen, plan)
    with Workspace(out, job, force=options.force, inputs=inputs) as work:
        _check_disk(snapshot, options, chosen, work.path)
        run = _Run(snapshot, options, work.path, progress, session, traced, plan, parts)
        return _carry_out(run, chosen, target, work)


def _rejected(out: str | PathLike[str]) -> Path:
    """Where a model stands that is not as good as it was required to be."""
    place = Path(out).absolute()
    return place.with_name(place.name + _REJECTED)


def _carry_out(run: _Run, chosen: Selection | None, target: str, work: Workspace) -> PruneResult:
    run.artifacts.mkdir(exist_ok=True)
    if run.trace is not None:
        run.trace.save(run.artifacts / "trace")
    elif run.session is not None:
        run.trace = _traced(run, run.session)
    selection = _completed(chosen if chosen is not None else _selected(run), run.snapshot)
    run.notes += selection.warnings
    judgement = _judged(run, selection) if run.options.judgement is not None else None
    canary = _canary(run, selection)
    plans, hashes = _write(run, selection, target, canary)
    logits = _check_logits(run, canary) if canary is not None else None
    before, after = run.snapshot.total_bytes, sum(plan.size for plan in plans)
    said = tuple(judgement.lines()) if judgement is not None else ()
    write_card(run.work, CardFacts(run.snapshot.name, before, after, selection, target, run.trace, said))
    if judgement is not None:
        write_json(run.artifacts / "judgement.json", judgement.to_document())
    write_manifest(run.work, run.snapshot, target, hashes, canary_missing=run.logits_skipped)
    required = run.options.judgement.require if run.options.judgement is not None else None
    rejected = required is not None and judgement is not None and not judgement.verdict.satisfies(required)
    path = work.complete(suffix=_REJECTED if rejected else "")
    notes = tuple(run.notes)
    return PruneResult(path, selection, target, before, after, logits, run.logits_skipped, notes, judgement, rejected)


def _complete_options(
    options: PruneOptions, data: ExampleOptions | DataOptions | str | PathLike[str] | None, keep: float | None
) -> PruneOptions:
    if data is not None:
        samples = DEFAULT_SAMPLES if options.choice else PAPER_SAMPLES
        options = replace(options, trace=as_example_options(data, samples))
    if keep is not None:
        options = replace(options, select=as_select_options(keep))
    if options.select is None and options.choice is not None and options.choice.limit is not None:
        options = replace(options, select=as_select_options(1.0))  # the limit decides how many are kept
    if options.trace is not None:
        options = replace(options, trace=replace(options.trace, device=options.device, dtype=options.dtype))
    return options


def _plan_choice(
    snapshot: Snapshot, options: PruneOptions, trace: Trace | None, progress: Progress
) -> SearchPlan | None:
    """Which examples calibrate and which judge candidates, None where nothing is left to choose."""
    choice, select = options.choice, options.select
    if choice is None or select is None:
        return None
    seed = select.scoring.seed
    tracing = held_out_tracing(options.trace, trace, choice.held_out, seed)
    tracing = replace(tracing, device=options.device, dtype=options.dtype)
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
        held = trace.statistics if trace is not None else STATISTICS
        methods = methods_to_try(select.method, choice, snapshot.moe.top_k, held)
        choice.limit.check_examples(len(plan.held_out.records), len(methods))
    return plan


def _target(options: PruneOptions, chosen: Selection | None) -> str:
    """The target that the selection is made for."""
    if options.select is not None:
        return options.select.method.target
    assert chosen is not None
    return chosen.target


def _check_writable(snapshot: Snapshot, chosen: Selection | None, target: str) -> None:
    """Find out before the work whether this model's configuration can be rewritten."""
    if chosen is not None:
        plan_checkpoint(snapshot, chosen)
        pruned_config(snapshot.config, snapshot.moe, chosen, target)
        return
    pruned_config(
        snapshot.config, snapshot.moe, whole_selection(snapshot.moe_layers, snapshot.moe.num_experts), "ragged"
    )


def _job(
    snapshot: Snapshot,
    options: PruneOptions,
    session: ModelSession | None,
    trace: str | PathLike[str] | None,
    chosen: Selection | None,
    plan: SearchPlan | None,
) -> Mapping[str, Any]:
    """What decides the result, by its content: the model, the artifacts that enter, and the options."""
    description = asdict(options)
    description.pop("force")
    files = sorted(path for path in Path(trace).rglob("*") if path.is_file()) if trace else []
    return {
        "verb": "prune",
        "model": fingerprint(snapshot),
        "layout": layout_fingerprint(snapshot),
        "session": session.job() if session else None,
        "held_out": plan.held_out_job() if plan else None,
        "traced": [file_hash(file) for file in files],
        "selection": chosen.to_document() if chosen else None,
        **description,
    }


def _check_disk(snapshot: Snapshot, options: PruneOptions, chosen: Selection | None, folder: Path) -> None:
    keep = chosen.keep if chosen is not None else options.select.keep if options.select else 1.0
    expert_bytes = sum(s.size for s in snapshot.tensors.values() if snapshot.role(s.name).role in ("expert", "packed"))
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed = snapshot.total_bytes - expert_bytes * (1 - keep) + _DISK_MARGIN - written
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ShapeMoeError(
            f"The pruned checkpoint needs about {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free "
            f"on the disk of {folder.parent}; free some space or choose another --output."
        )


def _traced(run: _Run, session: ModelSession) -> Trace:
    """The trace of the calibration set: made now, or found where an interrupted run left it."""
    folder = run.artifacts / "trace"
    if (folder / "trace.json").is_file():
        run.progress.note("Going on with the trace of the interrupted run.")
    return kept_trace(lambda: session, folder)


def _selected(run: _Run) -> Selection:
    assert run.trace is not None
    assert run.options.select is not None
    if run.plan is not None and run.options.choice is not None:
        folder, file = run.work / "candidates.partial", run.artifacts / "selection.json"
        if file.is_file():
            run.progress.note("Going on with the selection that the interrupted run has chosen.")
            chosen = load_selection(file)
        else:
            folder.mkdir(exist_ok=True)
            chosen = auto_select(
                run.snapshot, run.plan, run.trace, run.options.select, run.options.choice, run.progress, folder
            )
            chosen.save(file)
        shutil.rmtree(folder, ignore_errors=True)
        run.progress.note(f"Chosen: {chosen.choice['reason'] if chosen.choice else ''}")
        return chosen
    return select_from_trace(run.trace, run.options.select)


def _completed(selection: Selection, snapshot: Snapshot) -> Selection:
    """The selection with what a table of values could not know about the model."""
    if selection.fingerprint is not None:
        return selection
    return replace(
        selection,
        fingerprint=fingerprint(snapshot),
        model=snapshot.name,
        family=snapshot.moe.family.model_type,
        top_k=snapshot.moe.top_k,
    )


def _parts(options: PruneOptions) -> Parts | None:
    """The calibration sample, kept whole, and records beyond it to report by; None where nothing is judged."""
    if options.judgement is None or options.trace is None:
        return None
    return set_aside(options.trace.data, options.judgement, give_up=False)


def _judged(run: _Run, selection: Selection) -> Judgement:
    """What pruning did to the model, while the full model is (or can be) loaded."""
    options, device, dtype = run.options.judgement, run.options.device, run.options.dtype
    assert options is not None
    if run.session is None:
        reason = why_not_loadable(loaded_bytes(run.snapshot, dtype), device)
        if reason:
            return no_judgement(f"The original was not loaded: {reason}.", options)
        run.session = session_of_trace(run.snapshot, run.trace, device, dtype, run.progress) if run.trace else None
    if run.session is None:
        return no_judgement(_NO_EXAMPLES, options)
    parts, data, chosen_by = run.parts, run.session.options.data, []
    if run.plan is not None:
        parts, data, chosen_by = run.plan.parts, run.plan.data, run.plan.held_out.records
    if parts is None:
        parts = unseen_parts(data, run.trace, chosen_by, options)
    return judge_selection(run.session, parts, data, selection, options)


def _canary(run: _Run, selection: Selection) -> Canary | None:
    """The masked original's answers, while the full model is (or can be) loaded; None, with the reason noted."""
    if not run.options.check_logits:
        run.logits_skipped = "--no-logits was given"
    elif run.session is None:
        reason = why_not_loadable(loaded_bytes(run.snapshot, run.options.dtype), run.options.device)
        run.logits_skipped = f"the original was not loaded: {reason}" if reason else None
    if run.logits_skipped is not None:
        run.notes.append(f"Logits were not compared: {run.logits_skipped}.")
        return None
    if run.session is not None:
        model = run.session.model
    else:
        model = load_original(run.snapshot, run.options.device, run.options.dtype, run.progress)
    tokens = run.trace.info.canary if run.trace else []
    with run.progress.phase("Recording the canary", 1, "step") as advance, masked(model, selection):
        canary = record_canary(model, tokens or random_tokens(run.snapshot.config["vocab_size"]))
        advance(1)
    if run.session is not None:
        run.session.unload()
    del model
    release_memory()
    return canary


def _write(
    run: _Run, selection: Selection, target: str, canary: Canary | None
) -> tuple[list[ShardPlan], dict[str, str]]:
    """Write shards and compare every tensor with the original; then everything that is small.

    Returns:
        The shards, and the sha256 of each file.
    """
    plans = plan_checkpoint(run.snapshot, selection)
    with run.progress.phase("Writing and comparing tensors", 2 * sum(plan.size for plan in plans), "B") as advance:
        hashes = write_compared(plans, run.work, advance)
    write_index(plans, run.work)
    write_json(run.work / "config.json", pruned_config(run.snapshot.config, run.snapshot.moe, selection, target))
    if target == "ragged":
        copy_code(run.work)
    copy_root_files(run.snapshot.path, run.work)
    selection.save(run.artifacts / "selection.json")
    if canary is not None:
        canary.save(run.artifacts / "canary.json")
    return plans, hashes


def _check_logits(run: _Run, canary: Canary) -> CanaryResult:
    pruned = open_snapshot(run.work)
    with run.progress.phase("Comparing logits", 1, "step") as advance:
        model = load_model(pruned, device=run.options.device, dtype=run.options.dtype)
        result = compare_canary(model, canary)
        advance(1)
    if not result.passed:
        raise CheckpointError(
            f"The pruned model's logits differ from the masked original's (KL {result.mean_kl:.2g}, top-1 agreement "
            f"{result.top1_agreement:.1%}): the checkpoint is not what it should be. It stays in {run.work}."
        )
    return result
