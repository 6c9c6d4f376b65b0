"""Which examples calibrate and which judge: they never share a prompt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.example_maker import SPLIT_KEY, ExampleMaker, options_of
from shape_moe.calibration.parts import Parts
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions, Record
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.calibration.sources import Data
from shape_moe.calibration.split import split_records
from shape_moe.errors import UsageError
from shape_moe.jobs.held_out import fresh_records
from shape_moe.jobs.judgement import JudgementOptions, set_aside
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions, ModelSession, as_example_options
from shape_moe.progress import Progress
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace


@dataclass(frozen=True)
class SearchPlan:
    """What a search for a keep rate works with.

    Attributes:
        session: the model, and the calibration records where they are still to be traced.
        trace: the finished trace, None where it is still to be made.
        held_out: the held-out records.
        sentence: how calibration and held-out examples were told apart.
        parts: those records and others to report by, where the source was told apart for that as well.
        calibration: the calibration records; None where a finished trace does not lead back to them.
    """

    session: ModelSession
    trace: Trace | None
    held_out: ExampleMaker
    sentence: str
    parts: Parts | None = None
    calibration: ExampleMaker | None = None

    @property
    def data(self) -> DataOptions:
        """Where the held-out records come from."""
        return self.held_out.data

    def told(self, selection: Selection) -> Selection:
        """A selection that was chosen by the held-out examples, which then never report on it."""
        return chosen_by(selection, self.held_out.records)

    def held_out_job(self) -> list[Any]:
        """What decides the held-out examples, for a job file: their content, and which of the source they are."""
        return [self.held_out.content_hash, [record.index for record in self.held_out.records]]


def chosen_by(selection: Selection, records: Collection[Record]) -> Selection:
    """A selection that records had a part in choosing, which then never report on it."""
    return replace(selection, seen=SeenPrompts.of_salts(selection.seen).with_records(records).by_salt())


def held_out_tracing(
    data: ExampleOptions | DataOptions | Data | None,
    trace: Trace | None,
    held_out: DataOptions | None,
    seed: int = 0,
) -> ExampleOptions:
    """How a search reads examples: as it traces them, or, with a finished trace alone, as that was made.

    Args:
        data: the examples that calibrate.
        trace: a finished trace.
        held_out: other examples to judge by.
        seed: draws from the source of a trace.

    Raises:
        UsageError: when neither is given.
    """
    if data is not None:
        return as_example_options(data, DEFAULT_SAMPLES)
    if trace is None:
        raise UsageError("Give examples (--data), a trace (--trace), or both.")
    if held_out is not None:
        return ExampleOptions(held_out)
    if not trace.info.source.get("data"):
        raise UsageError("The trace does not name its examples; give held-out ones (--held-out).")
    data, tokens, answers = options_of(trace.info.source)
    return ExampleOptions(replace(data, seed=seed), tokens, answers)


def plan_search(
    snapshot: Snapshot,
    tracing: ExampleOptions,
    trace: Trace | None,
    held_out: DataOptions | None,
    samples: int,
    seed: int,
    progress: Progress,
    judgement: JudgementOptions | None = None,
    *,
    give_up: bool = True,
) -> SearchPlan:
    """Decide which examples calibrate and which judge.

    Args:
        snapshot: the model.
        tracing: the examples, and how they are tokenised and answered.
        trace: a finished trace.
        held_out: other examples to judge by; those whose prompts calibration has seen are left out.
        samples: how many to judge by.
        seed: draws the sides of a split.
        progress: where to show notes.
        judgement: how the model that comes of the search is judged, None where none does.
        give_up: whether calibration and choice may give up records for that, where there are no others.

    Raises:
        ShapeMoeError: when the model, the trace or the examples cannot be used.
    """
    if trace is None and held_out is None:
        if judgement is not None:
            return _three_part_plan(snapshot, tracing, samples, judgement, progress, give_up=give_up, seed=seed)
        return _split_plan(snapshot, tracing, samples, seed, progress)
    source = held_out or tracing.data
    if trace is not None:
        known = _prompts_of(trace, progress, others=held_out is not None)
        records, seen = fresh_records(source, known, samples)
        session = ModelSession.open(snapshot, replace(tracing, data=source, keep_also=()), None, progress, records)
        judged = session.calibrator
        traced = [record for record in load_records(replace(tracing.data, samples=None)) if record in known]
        calibration = session.calibrator_of(traced, tracing.data) if traced else None
    else:
        wanted = load_records(tracing.data, progress)
        records, seen = fresh_records(source, SeenPrompts.of_records(wanted), samples)
        session = ModelSession.open(snapshot, tracing, None, progress, wanted)
        judged, calibration = session.calibrator_of(records, source), session.calibrator
    sentence = f"{len(records)} held-out examples of {source.name}"
    if seen:
        sentence += f"; {seen} more were left out, because calibration has seen their prompts"
        if held_out is not None:
            progress.note(f"{seen} examples of {source.name} are in the calibration set as well and were left out.")
    return SearchPlan(session, trace, judged, sentence, None, calibration)


def _prompts_of(trace: Trace, progress: Progress, *, others: bool) -> SeenPrompts:
    """The prompts that a trace has seen; where it does not name them, ``others`` have to be given to judge by."""
    seen = SeenPrompts.of_source(trace.info.source)
    if seen.complete:
        return seen
    if not others:
        raise UsageError(
            "The trace does not name its prompts, so held-out examples cannot be told from them: give others with "
            "--held-out."
        )
    progress.note("The trace does not name its prompts: make sure that calibration has not seen these examples.")
    return seen


def _split_plan(
    snapshot: Snapshot, tracing: ExampleOptions, held_out: int, seed: int, progress: Progress
) -> SearchPlan:
    """Split one source into calibration and held-out examples."""
    wanted = tracing.data.samples or DEFAULT_SAMPLES
    pool = load_records(replace(tracing.data, samples=wanted + held_out), progress)
    split = split_records(pool, wanted, held_out, seed=seed)
    session = ModelSession.open(snapshot, tracing, None, progress, split.calibration)
    session.source_notes[SPLIT_KEY] = split.sentence
    held = session.calibrator_of(split.held_out, tracing.data)
    return SearchPlan(session, None, held, split.sentence, None, session.calibrator)


def _three_part_plan(
    snapshot: Snapshot,
    tracing: ExampleOptions,
    choice: int,
    judgement: JudgementOptions,
    progress: Progress,
    *,
    give_up: bool,
    seed: int,
) -> SearchPlan:
    """Split one source into examples to calibrate, to choose and to report by."""
    data = replace(tracing.data, samples=tracing.data.samples or DEFAULT_SAMPLES)
    parts = set_aside(data, judgement, choice=choice, give_up=give_up, seed=seed, progress=progress)
    session = ModelSession.open(snapshot, tracing, None, progress, parts.calibration)
    session.source_notes[SPLIT_KEY] = parts.sentence
    held = session.calibrator_of(parts.choice, tracing.data)
    return SearchPlan(session, None, held, parts.sentence, parts, session.calibrator)
