"""The whole job: trace, select, write the smaller checkpoint, and check it against the original."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.fingerprint import fingerprint, layout_fingerprint
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.layered_model import why_not_layered
from shape_moe.architectures.loading import free_memory, release_memory
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.parts import Parts
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.errors import DataError, ShapeMoeError, UsageError
from shape_moe.jobs.auto import ChoiceOptions, auto_select, methods_to_try
from shape_moe.jobs.closing import card_facts, commands_after
from shape_moe.jobs.judgement import (
    Judgement,
    JudgementOptions,
    judge_selection,
    no_judgement,
    set_aside,
)
from shape_moe.jobs.judging_examples import (
    OTHERS,
    Unseen,
    examples_given,
    examples_of_trace,
    seen_by,
    session_for,
    unseen_parts,
)
from shape_moe.jobs.layered_judgement import judge_layer_by_layer
from shape_moe.jobs.measure import measured_curves
from shape_moe.jobs.planning import SearchPlan, held_out_tracing, plan_search
from shape_moe.jobs.pruned_place import PrunedPlace, place_of
from shape_moe.jobs.select import as_select_options, check_options
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions, ModelSession, as_example_options, load_original
from shape_moe.jobs.trace import kept_trace, open_trace
from shape_moe.jobs.way import check_measurable, check_whole
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.canary import Canary, CanaryResult
from shape_moe.pruning.compare import file_hash
from shape_moe.pruning.logits import check_logits, masked_answers, why_no_logits
from shape_moe.pruning.writers import Writer, what_is_left_out, writer_for
from shape_moe.reporting.model_card import write_card
from shape_moe.reporting.opening import Opening
from shape_moe.selection.layer_curves import load_curves
from shape_moe.selection.method import PUBLISHED_SAMPLES, Method
from shape_moe.selection.rules import budget_for, check_by_priority, get_rule
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection, completed, load_selection, open_selection
from shape_moe.serving.manifest import write_manifest
from shape_moe.tracing.trace import Trace
from shape_moe.units import capitalised, readable_size
from shape_moe.workspace import Workspace, write_json

PAPER_SAMPLES = PUBLISHED_SAMPLES
"""Calibration examples of the published experiments."""
_DISK_MARGIN = 64 * 2**20
GGUF_METHOD = Method(routing="reroute", target="stock")
"""How a GGUF file is pruned when nothing else is said: llama.cpp loads equal counts only."""


@dataclass(frozen=True)
class PruneOptions:
    """What is asked of a pruned checkpoint.

    Attributes:
        select: how experts are chosen; None when a finished selection is given.
        trace: the calibration set and how to trace; None when a trace or a selection is given. Its device, dtype
            and stream are overruled by those below.
        device: where to trace and to compare logits.
        dtype: in which dtype.
        trust_remote_code: run the code that comes with the original instead of Transformers' own, where there is some.
        stream: trace and judge layer by layer (True), or with the whole model in memory (False); None decides by free
            memory.
        choice: how candidates are judged where scorer or keep rate are left to the tool, None where they are not.
        judgement: how the pruned model is judged, None for not at all.
        check_logits: compare the pruned model's logits with the masked original's, where both fit in memory.
        force: replace an existing result, accept artifacts of unknown origin.
    """

    select: SelectOptions | None = None
    trace: ExampleOptions | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    stream: bool | None = None
    choice: ChoiceOptions | None = None
    judgement: JudgementOptions | None = field(default_factory=JudgementOptions)
    check_logits: bool = True
    force: bool = False


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


@dataclass
class _Run:
    """One pruning job on its way through the phases: what enters it, and what has come of it so far.

    Attributes:
        snapshot: the original.
        options: what is asked.
        progress: where to show progress.
        chosen: a finished selection, where that is given.
        trace: a finished trace, where that is given; later the one that was made.
        plan: which examples calibrate and which judge candidates, where those are to be judged.
        parts: the examples told apart, where nothing is chosen by some of them.
        session: what traces the calibration set, where that is given.
        judge: what reads examples that only judge, where such are given.
        notes: what the user should know.
    """

    snapshot: Snapshot
    options: PruneOptions
    progress: Progress
    chosen: Selection | None = None
    trace: Trace | None = None
    plan: SearchPlan | None = None
    parts: Parts | None = None
    session: ModelSession | None = None
    judge: ModelSession | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def target(self) -> str:
        """The target that the selection is made for."""
        if self.options.select is not None:
            return self.options.select.method.target
        assert self.chosen is not None
        return "stock" if isinstance(self.snapshot, GgufModel) else self.chosen.target

    @property
    def writer(self) -> Writer:
        """What writes the result."""
        return writer_for(self.snapshot, self.target)


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
    keep=0.6)`` is the published method. With scorer ``auto`` or a limit (``options.choice``) candidates are judged on
    held-out examples first; with a finished trace, ``data`` says where those come from.

    Args:
        model: a folder, a GGUF file or a hub id.
        out: folder of the pruned checkpoint; of a GGUF file the pruned file.
        options: see :class:`PruneOptions`.
        data: calibration set: a file, folder or data set, a list of dictionaries or a ``datasets.Dataset`` (of which at
            most 25 records are used), or options that say more.
        keep: keep rate.
        trace: a trace folder; skips tracing.
        selection: a selection; skips tracing and selecting.
        revision: of a hub model.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do, and nothing stands under ``out``.
    """
    place = place_of(model, out)
    options = _complete_options(options or PruneOptions(), data, keep, gguf=place.file is not None)
    _check_request(options, trace, selection)
    inputs: list[str | PathLike[str]] = [p for p in (model, trace, selection) if isinstance(p, str | PathLike)]
    inputs += options.trace.data.files if options.trace else []
    rejects = options.judgement is not None and options.judgement.require is not None
    place.check(inputs, force=options.force, rejects=rejects)
    free_memory(options.device)
    run = _Run(open_snapshot(model, revision, trust_remote_code=options.trust_remote_code), options, progress)
    _open_inputs(run, trace, selection)
    inputs += [run.snapshot.path, *(run.plan.data.files if run.plan else [])]
    with Workspace(place.folder, _job(run, trace), force=options.force, inputs=inputs) as work:
        _check_disk(run, work.path)
        return _carry_out(run, work, place)


def _makes_curves(asked: SelectOptions) -> bool:
    """Whether layers have to be measured before a budget can be shared out."""
    return get_rule(asked.method.rule).by_curves and asked.curves is None


def _open_inputs(
    run: _Run, trace: str | PathLike[str] | None, selection: str | PathLike[str] | Selection | None
) -> None:
    """Open what enters the job, and check all that can be checked before weights are loaded."""
    snapshot, options = run.snapshot, run.options
    if selection is not None:
        run.chosen = open_selection(selection, snapshot, force=options.force)
    if options.select is not None:
        moe, automatic = snapshot.moe, options.choice is not None
        check_options(options.select, snapshot.moe_layers, moe.num_experts, moe.routing, automatic=automatic)
    run.writer.check(snapshot, run.chosen)
    if trace is not None:
        run.trace = open_trace(trace, snapshot, run.progress, force=options.force)
    run.plan = _plan_choice(snapshot, options, run.trace, run.progress)
    if run.plan is not None:
        run.session = run.plan.session
    elif options.trace is not None and (trace is not None or selection is not None):
        run.judge = session_for(options.trace, snapshot, run.progress)
    elif options.trace is not None:
        if options.select is not None and _makes_curves(options.select):
            check_measurable(snapshot, options.trace)
        records = None
        if options.judgement is not None:
            run.parts = set_aside(options.trace.data, options.judgement, give_up=False, progress=run.progress)
            records = run.parts.calibration
        run.session = ModelSession.open(snapshot, options.trace, None, run.progress, records)


def _carry_out(run: _Run, work: Workspace, place: PrunedPlace) -> PruneResult:
    """The phases: trace, select, ask the masked original, write, ask the result the same, describe."""
    artifacts = work.path / "shape"
    artifacts.mkdir(exist_ok=True)
    _trace(run, artifacts / "trace")
    selection = completed(run.chosen if run.chosen is not None else _selected(run, work.path), run.snapshot)
    left_out = what_is_left_out(run.snapshot)
    selection.save(artifacts / "selection.json")
    run.notes += [*selection.warnings, *left_out]
    judgement = _judged(run, selection) if run.options.judgement is not None else None
    canary, logits_skipped = _canary(run, selection)
    written = run.writer.write(run.snapshot, selection, work.path, run.progress)
    logits = None
    if canary is not None:
        canary.save(artifacts / "canary.json")
        logits = check_logits(canary, written.path, run.options.device, run.options.dtype, run.progress)
    before, after = run.snapshot.total_bytes, written.size
    facts = card_facts(run.snapshot.name, (before, after), selection, run.trace, left_out, judgement, place.file)
    write_card(work.path, facts)
    if judgement is not None:
        write_json(artifacts / "judgement.json", judgement.to_document())
    write_manifest(work.path, run.snapshot, run.target, written.hashes, canary_missing=logits_skipped)
    required = run.options.judgement.require if run.options.judgement is not None else None
    rejected = required is not None and judgement is not None and not judgement.verdict.satisfies(required)
    path = place.complete(work, rejected=rejected)
    following = () if rejected else tuple(commands_after(facts, path))
    return PruneResult(
        path,
        selection,
        run.target,
        before,
        after,
        logits,
        logits_skipped,
        tuple(run.notes),
        judgement,
        rejected,
        facts.opening,
        following,
    )


def _check_request(
    options: PruneOptions, trace: str | PathLike[str] | None, selection: str | PathLike[str] | Selection | None
) -> None:
    """Refuse requests that name too little or too much.

    Raises:
        UsageError: saying what to give.
    """
    if options.choice is not None:
        if selection is not None or (options.trace is None and trace is None):
            raise UsageError("Scorer auto and limits choose on held-out examples: give data (--data) or a trace.")
        for rule in (*(options.choice.rules or ()), *([options.select.method.rule] if options.select else [])):
            check_by_priority(rule)
    elif sum(given is not None for given in (trace, selection)) > 1:
        raise UsageError("--trace and --selection exclude each other; give one of them.")
    elif options.trace is None and trace is None and selection is None:
        raise UsageError("Give calibration data (--data), a trace (--trace) or a selection (--selection).")
    elif options.trace is not None and options.judgement is None and (trace is not None or selection is not None):
        raise UsageError("Beside a trace or a selection, data (--data) only judge: leave them out without judgement.")
    asked = options.select
    if asked is not None and _makes_curves(asked) and options.trace is None:
        raise UsageError(
            f"Rule {asked.method.rule} needs layer curves: make them with `shape-moe measure` and give them by "
            "--curves, or start from --data, whose examples are then measured."
        )
    if (options.select is None) != (selection is not None):
        raise UsageError("Give a keep rate (--keep or --fit) with data or a trace, and none with a selection.")


def _complete_options(
    options: PruneOptions, data: ExampleOptions | DataOptions | Data | None, keep: float | None, *, gguf: bool
) -> PruneOptions:
    if data is not None:
        samples = DEFAULT_SAMPLES if options.choice else PAPER_SAMPLES
        options = replace(options, trace=as_example_options(data, samples))
    if keep is not None:
        select = as_select_options(keep)
        if gguf:
            select = replace(select, method=GGUF_METHOD, allow_rounding=True)
        options = replace(options, select=select)
    if options.select is None and options.choice is not None and options.choice.limit is not None:
        options = replace(options, select=as_select_options(1.0))  # the limit decides how many are kept
    if options.trace is not None:
        options = replace(
            options, trace=replace(options.trace, device=options.device, dtype=options.dtype, stream=options.stream)
        )
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
    tracing = replace(tracing, device=options.device, dtype=options.dtype, stream=options.stream)
    check_whole(snapshot, tracing)
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
        methods = methods_to_try(select.method, choice, snapshot.moe.top_k, held)
        choice.limit.check_examples(len(plan.held_out.records), len(methods))
    return plan


def _job(run: _Run, trace: str | PathLike[str] | None) -> Mapping[str, Any]:
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


def _check_disk(run: _Run, folder: Path) -> None:
    """Refuse a job whose result would not fit the disk, less what an interrupted run has written already."""
    total = run.snapshot.moe.num_experts * len(run.snapshot.moe_layers)
    select = run.options.select
    kept = run.chosen.kept if run.chosen is not None else budget_for(select.keep, total) if select else total
    needed = run.writer.bytes_for(run.snapshot, kept) + _DISK_MARGIN - run.writer.bytes_there(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ShapeMoeError(
            f"The pruned checkpoint needs about {readable_size(needed)}, but only {readable_size(free)} are free on "
            f"the disk of {folder.parent}; free some space or choose another --output."
        )


def _trace(run: _Run, folder: Path) -> None:
    """The trace of the job goes with its result: the one that is given, or one made now or by an interrupted run."""
    if run.trace is not None:
        # older traces hold the beginnings of examples
        replace(run.trace, info=replace(run.trace.info, canary=[])).save(folder)
    elif (session := run.session) is not None:
        if (folder / "trace.json").is_file():
            run.progress.note("Using the trace that the interrupted run has made.")
        run.trace = kept_trace(lambda: session, folder)


def _selected(run: _Run, work: Path) -> Selection:
    """The selection: by the method that was asked for, or by what candidates are worth on held-out examples."""
    assert run.trace is not None
    assert run.options.select is not None
    if run.plan is not None and run.options.choice is not None:
        folder, file = work / "candidates.partial", work / "shape" / "selection.json"
        if file.is_file():
            run.progress.note("Using the selection that the interrupted run has chosen.")
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
    asked = run.options.select
    if _makes_curves(asked):
        assert run.session is not None, "checked before"
        file = work / "shape" / "curves.json"
        if not file.is_file():
            measured_curves(run.session, run.trace, asked.method, asked.scoring, run.progress).save(file)
        asked = replace(asked, curves=load_curves(file))
    return select_from_trace(run.trace, asked)


def _judged(run: _Run, selection: Selection) -> Judgement:
    """What pruning did to the model, while the full model is (or can be) loaded."""
    options, device, dtype = run.options.judgement, run.options.device, run.options.dtype
    assert options is not None
    if run.session is None and run.judge is None:
        reason = why_no_logits(run.snapshot, device, dtype)
        if reason and why_not_layered(run.snapshot):
            return no_judgement(f"{capitalised(reason)}.", options)
    try:
        found = _unseen(run, selection, options)
    except DataError as error:
        return no_judgement(str(error), options)
    run.session = found.session
    notes = [found.note] if found.note else []
    if found.session.reads_layers:
        return judge_layer_by_layer(found.session, found.parts, found.data, selection, options, notes)
    seen = seen_by(run.trace, selection)
    return judge_selection(found.session, found.parts, found.data, selection, options, seen, notes)


def _unseen(run: _Run, selection: Selection, options: JudgementOptions) -> Unseen:
    """The examples that the model is judged by.

    Raises:
        DataError: saying why there are none.
    """
    seen, session = seen_by(run.trace, selection), run.session
    if run.judge is not None:
        return examples_given(run.judge, seen, options)
    if run.plan is not None and session is not None:
        data, chosen_by = run.plan.data, run.plan.held_out.records
        return Unseen(session, data, run.plan.parts or unseen_parts([data], seen, chosen_by, options))
    if session is not None and run.parts is not None:
        return Unseen(session, session.options.data, run.parts)
    if run.trace is None:
        raise DataError(f"There are no examples that played no part in making the model. {OTHERS}.")
    where = {"device": run.options.device, "dtype": run.options.dtype, "stream": run.options.stream}
    return examples_of_trace(run.snapshot, run.trace, options, where, run.progress)


def _canary(run: _Run, selection: Selection) -> tuple[Canary | None, str | None]:
    """The masked original's answers, while the full model is (or can be) loaded; else None, and why."""
    options, session = run.options, run.session or run.judge
    reason = None if options.check_logits else "--no-logits was given"
    if reason is None and session is None:
        reason = why_no_logits(run.snapshot, options.device, options.dtype)
    if reason is None and session is not None and session.reads_layers:
        reason = why_no_logits(run.snapshot, options.device, options.dtype) or "--stream was given"
    if reason is not None:
        run.notes.append(f"Logits were not compared: {reason}.")
        return None, reason
    model = session.model if session else load_original(run.snapshot, options.device, options.dtype, run.progress)
    canary = masked_answers(run.snapshot, model, selection, run.progress)
    if session is not None:
        session.unload()
    del model
    release_memory()
    return canary, None
