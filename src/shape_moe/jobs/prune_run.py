"""One pruning job on its way through its phases: trace, select, judge, ask the masked original."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.layered_model import why_not_layered
from shape_moe.architectures.loading import release_memory
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.calibration.parts import Parts, without_seen
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import DataError
from shape_moe.evaluation.subjects import seen_by
from shape_moe.interop.imatrix import Imatrix
from shape_moe.jobs.auto import auto_select
from shape_moe.jobs.curves import CurveMaker, curves_file
from shape_moe.jobs.judgement import (
    Judgement,
    JudgementOptions,
    judge_selections,
    no_judgement,
)
from shape_moe.jobs.judging_examples import (
    OTHERS,
    Unseen,
    examples_given,
    examples_of_trace,
    unseen_parts,
)
from shape_moe.jobs.layered_judgement import judge_layer_by_layer
from shape_moe.jobs.planning import SearchPlan, chosen_by
from shape_moe.jobs.prune_options import PruneOptions, makes_curves
from shape_moe.jobs.refit import choose_refit
from shape_moe.jobs.session import ModelSession, load_original
from shape_moe.jobs.trace import kept_trace
from shape_moe.progress import Progress
from shape_moe.pruning.canary import Canary
from shape_moe.pruning.logits import masked_answers, why_no_logits
from shape_moe.pruning.refitted_tensors import stored_dtype, why_not_refittable
from shape_moe.pruning.writers import Writer, writer_for
from shape_moe.selection.layer_curves import load_curves
from shape_moe.selection.rules import get_rule
from shape_moe.selection.select import SelectOptions, TraceSelector
from shape_moe.selection.selection import Selection, completed, load_selection
from shape_moe.tracing.trace import Trace
from shape_moe.units import capitalised

REFIT_FOLDER = "refit.partial"
"""Where candidates of a refit lie until the checkpoint is written."""


@dataclass
class PruneRun:
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
        imatrix: of the original, where one is given.
        asked: the options as they were given; those of the job name a method where nothing can be judged.
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
    imatrix: Imatrix | None = None
    asked: PruneOptions = field(init=False)

    def __post_init__(self) -> None:
        self.asked = self.options

    @property
    def target(self) -> str:
        """The target that the selection is made for."""
        if self.options.select is not None:
            return self.options.select.method.target
        assert self.chosen is not None
        return "stock" if isinstance(self.snapshot, GgufModel) else self.chosen.target

    @property
    def chooses(self) -> bool:
        """Whether the method was left to the tool, though nothing may have been judged for that."""
        return self.asked.choice is not None

    @property
    def may_refit(self) -> bool:
        """Whether the kept experts' down projections may come to be refitted."""
        if self.options.refit == "auto":
            return why_not_refittable(self.snapshot) is None
        return self.options.refit == "on"

    @property
    def writer(self) -> Writer:
        """What writes the result."""
        return writer_for(self.snapshot, self.target)


def trace_calibration(run: PruneRun, work: Path) -> None:
    """The trace of the job goes with its result: the one that is given, or one made now or by an interrupted run."""
    folder = work / "shape" / "trace"
    folder.parent.mkdir(exist_ok=True)
    if run.trace is not None:
        # older traces hold the beginnings of examples
        replace(run.trace, info=replace(run.trace.info, canary=[])).save(folder)
    elif (session := run.session) is not None:
        if (folder / "trace.json").is_file():
            run.progress.note("Using the trace that the interrupted run has made.")
        run.trace = kept_trace(lambda: session, folder)


def selected(run: PruneRun, work: Path) -> Selection:
    """The selection: a given one, the best of candidates on held-out examples, or that of the method asked for."""
    if run.chosen is not None:
        return completed(run.chosen, run.snapshot)
    if run.plan is not None:
        return completed(_best_candidate(run, work), run.snapshot)
    assert run.trace is not None
    assert run.options.select is not None
    asked = with_curves(run, run.options.select, work)
    return completed(TraceSelector(run.trace, asked.scoring).select(asked), run.snapshot)


def _best_candidate(run: PruneRun, work: Path) -> Selection:
    """The candidate that loses least; one that an interrupted run has chosen already is taken."""
    assert run.trace is not None
    assert run.plan is not None
    assert run.options.select is not None
    assert run.options.choice is not None
    folder, file = work / "candidates.partial", work / "shape" / "selection.json"
    if file.is_file():
        run.progress.note("Using the selection that the interrupted run has chosen.")
        chosen = replace(load_selection(file), refit=None)  # the refit's weights are found again, or made anew
    else:
        folder.mkdir(exist_ok=True)
        chosen = auto_select(
            run.snapshot, run.plan, run.trace, run.options.select, run.options.choice, run.progress, folder
        )
        if (made := folder / curves_file(chosen.method)).is_file() and get_rule(chosen.rule).by_curves:
            made.replace(work / "shape" / "curves.json")
        chosen.save(file)
    shutil.rmtree(folder, ignore_errors=True)
    run.progress.note(f"Chosen: {chosen.choice['reason'] if chosen.choice else ''}")
    return chosen


def with_curves(run: PruneRun, asked: SelectOptions, work: Path) -> SelectOptions:
    """What is asked of a selection, with layer curves where they are needed; measured once and kept in the work."""
    if not makes_curves(asked):
        return asked
    assert run.session is not None, "checked before"
    assert run.trace is not None
    file = work / "shape" / "curves.json"
    if not file.is_file():
        partial = work / "curves.partial"
        partial.mkdir(exist_ok=True)
        maker = CurveMaker(run.session, run.session.calibrator, run.trace, asked.scoring, run.progress, folder=partial)
        maker.measured(asked.method).save(file)
        shutil.rmtree(partial)
    return replace(asked, curves=load_curves(file))


def refitted_as_asked(run: PruneRun, selection: Selection, folder: Path) -> Selection:
    """The selection with refitted weights, where they are asked for and, if that is left open, worth it."""
    if run.options.refit == "off":
        return selection
    if (reason := why_not_refittable(run.snapshot)) is not None:
        run.progress.note(f"Not refitted: {reason}")
        return selection
    if (decide := _examples_for_refit(run)) is None:
        run.progress.note(
            "Not refitted: a refit needs the examples that calibrate, and others to choose by: give them by --data, "
            "without --trace and --selection."
        )
        return selection
    session, maker = decide
    selection = chosen_by(selection, maker.records)
    always, stored = run.options.refit == "on", stored_dtype(run.snapshot)
    found = choose_refit(session, selection, maker, stored, folder, always=always)
    run.notes += found.notes
    return found.selection


def _examples_for_refit(run: PruneRun) -> tuple[ModelSession, ExampleMaker] | None:
    """What calibrates a refit, and the examples that decide whether it is used; None where either is missing."""
    session, plan, parts = run.session, run.plan, run.parts
    if session is None:
        return None
    if plan is not None:  # with a finished trace the session holds what candidates are judged by
        return None if plan.trace is not None else (session, session.calibrator_of(plan.held_out.records, plan.data))
    if parts is None or not parts.choice:
        return None
    return session, session.calibrator_of(parts.choice, session.options.data)


def judged(run: PruneRun, selections: Sequence[Selection], work: Path) -> list[Judgement]:
    """What pruning did to the model, for each selection, while the full model is (or can be) loaded.

    Args:
        run: the job.
        selections: what is kept.
        work: the unfinished result, in which a judgement that was interrupted goes on.
    """
    options, device, dtype = run.options.judgement, run.options.device, run.options.dtype
    assert options is not None
    if run.session is None and run.judge is None:
        reason = why_no_logits(run.snapshot, device, dtype)
        if reason and why_not_layered(run.snapshot):
            return [no_judgement(f"{capitalised(reason)}.", options)] * len(selections)
    try:
        found = _unseen(run, selections[0], options)
    except DataError as error:
        return [no_judgement(str(error), options)] * len(selections)
    found = replace(found, parts=without_seen(found.parts, _measured_by(run), "layer curves"))
    run.session = found.session
    notes = [found.note] if found.note else []
    if found.session.reads_layers:
        folder = work / "judgement.partial"
        folder.mkdir(exist_ok=True)
        judgements = judge_layer_by_layer(found.session, found.parts, found.data, selections, options, notes, folder)
        shutil.rmtree(folder)
        return judgements
    seen = seen_by(run.trace, selections[0])
    return judge_selections(found.session, found.parts, found.data, selections, options, seen, notes)


def _measured_by(run: PruneRun) -> SeenPrompts:
    """The prompts of layer curves that were given, which may be others than the trace's."""
    curves = run.options.select.curves if run.options.select is not None else None
    return SeenPrompts.of_salts(curves.seen if curves is not None else {})


def _unseen(run: PruneRun, selection: Selection, options: JudgementOptions) -> Unseen:
    """The examples that the model is judged by.

    Raises:
        DataError: saying why there are none.
    """
    seen, session = seen_by(run.trace, selection), run.session
    if run.judge is not None:
        return examples_given(run.judge, seen, options)
    if run.plan is not None and session is not None:
        data, used = run.plan.data, run.plan.held_out.records
        return Unseen(session, data, run.plan.parts or unseen_parts([data], seen, used, options))
    if session is not None and run.parts is not None:
        return Unseen(session, session.options.data, run.parts)
    if run.trace is None:
        raise DataError(f"There are no examples that played no part in making the model. {OTHERS}.")
    where = {"device": run.options.device, "dtype": run.options.dtype, "stream": run.options.stream}
    return examples_of_trace(run.snapshot, run.trace, options, where, run.progress)


def masked_canaries(run: PruneRun, selections: Sequence[Selection]) -> tuple[list[Canary] | None, str | None]:
    """The masked original's answers for each selection, while the full model is (or can be) loaded; else why not."""
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
    canaries = [masked_answers(run.snapshot, model, selection, run.progress) for selection in selections]
    if session is not None:
        session.unload()
    del model
    release_memory()
    return canaries, None
