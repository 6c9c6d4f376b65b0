"""The judgement at the end of a job that writes a model: what pruning did, on examples that nothing else has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shape_moe.calibration.example_maker import ExampleMaker, options_of
from shape_moe.calibration.parts import FEWEST, MOST, Parts, three_parts
from shape_moe.calibration.records import DataOptions, Record, load_records
from shape_moe.errors import DataError, UsageError
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.conclusion import conclude
from shape_moe.evaluation.forgotten import Forgotten, GeneralCheck, general_records
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.outcomes import FREE_ANSWERS
from shape_moe.evaluation.verdict import MAX_DROP, REQUIREMENTS, Verdict, check_max_drop, not_measured
from shape_moe.jobs.held_out import fresh_records, held_out_set, known_prompts
from shape_moe.jobs.session import ModelSession
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace
from shape_moe.units import counted

_ADVICE = "Judge it by examples that it was not made from: shape-moe evaluate MODEL DIR --data FILE."


@dataclass(frozen=True)
class JudgementOptions:
    """How a model is judged when it is written.

    Attributes:
        max_drop: the fall, as a share, that *safe* allows.
        require: ``safe`` or ``no-loss``: what the verdict must be; None for nothing.
        examples: judge by at most this many.
        answers: let both models answer at most so many of them freely.
        general: ask general prompts as well.

    Raises:
        UsageError: for a ``max_drop`` outside (0, 1), another requirement, and numbers that are too small.
    """

    max_drop: float = MAX_DROP
    require: str | None = None
    examples: int = MOST
    answers: int = FREE_ANSWERS
    general: bool = True

    def __post_init__(self) -> None:
        check_max_drop(self.max_drop)
        if self.require is not None and self.require not in REQUIREMENTS:
            raise UsageError(f"--require takes {' or '.join(REQUIREMENTS)}, not {self.require!r}.")
        if self.examples < FEWEST or self.answers < 1:
            raise UsageError(f"A model is judged by {FEWEST} examples and 1 free answer at least.")


@dataclass(frozen=True)
class Judgement:
    """What a job says of the model that it has written.

    Attributes:
        verdict: the verdict.
        forgotten: what became of general prompts, None where they were not asked.
    """

    verdict: Verdict
    forgotten: Forgotten | None = None

    def lines(self) -> list[str]:
        """As people read it, in the terminal and on the model card alike."""
        return [*self.verdict.lines(), *(self.forgotten.lines() if self.forgotten else ())]

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.verdict.to_document(),
            "forgotten": self.forgotten.to_document() if self.forgotten else None,
        }


def set_aside(data: DataOptions, options: JudgementOptions, *, choice: int = 0, give_up: bool, seed: int = 0) -> Parts:
    """Tell the records of a source apart: to calibrate, to choose by and to report by.

    Args:
        data: the source, with the number of records to calibrate with.
        options: how many to report by.
        choice: how many to choose by.
        give_up: whether the calibration sample may give up records where the source has no others.
        seed: draws the parts.

    Raises:
        DataError: when the source cannot be read, or too few records are left to choose by.
    """
    if data.samples is None:
        everything = load_records(data)
        return three_parts(
            everything, calibration=len(everything), choice=choice, most=options.examples, give_up=give_up, seed=seed
        )
    wanted = load_records(replace(data, samples=data.samples + choice))
    more = load_records(replace(data, samples=data.samples + choice + options.examples))
    known = {record.index for record in wanted}
    beyond = [record for record in more if record.index not in known]
    return three_parts(
        wanted, beyond, calibration=data.samples, choice=choice, most=options.examples, give_up=give_up, seed=seed
    )


def unseen_records(trace: Trace, options: JudgementOptions, seed: int = 0) -> tuple[DataOptions, list[Record]]:
    """Records of a trace's source that the trace was not made from.

    Raises:
        DataError: when the trace does not say, the source cannot be read, or it has no others.
    """
    source, known = trace.info.source, known_prompts(trace)
    if known is None or not source.get("data"):
        raise DataError("the trace does not name its examples")
    data = replace(options_of(source)[0], seed=seed)
    return data, fresh_records(data, known, options.examples)[0]


def judge_selection(
    session: ModelSession,
    reporting: ExampleMaker | Sequence[Record],
    selection: Selection,
    options: JudgementOptions,
    notes: Sequence[str] = (),
) -> Judgement:
    """Judge a selection as a mask on the dense model, beside that.

    Args:
        session: gives the dense model.
        reporting: the records to report by.
        selection: what the written model keeps.
        options: see :class:`JudgementOptions`.
        notes: what else a reader should know.
    """
    maker = (
        reporting
        if isinstance(reporting, ExampleMaker)
        else session.calibrator_of(list(reporting), session.options.data)
    )
    held_out, progress = held_out_set(session, maker, "the judgement"), session.progress
    generation = GenerationOptions(options.answers)
    with Bench(session.model, session.tokenizer, held_out, generation=generation, progress=progress) as bench:
        with progress.phase("Judging the pruned model", len(held_out.examples), "example") as advance:
            sums, ours = bench.sums(selection, advance), bench.answers(selection)
        theirs = bench.dense_answers
        answers = (theirs, ours) if theirs is not None and ours is not None else None
        verdict = conclude(held_out, bench.dense_sums, sums, answers, max_drop=options.max_drop, notes=notes)
    return Judgement(verdict, _forgotten(session, selection) if options.general else None)


def no_judgement(reason: str, options: JudgementOptions) -> Judgement:
    """The judgement where nothing could be measured."""
    return Judgement(not_measured(reason, _ADVICE, max_drop=options.max_drop))


def announcement(examples: int, options: JudgementOptions) -> str:
    """What is about to be done, before it is."""
    asked = [counted(examples, "example"), f"up to {counted(options.answers, 'free answer')}"]
    asked += [f"{len(general_records())} general prompts"] if options.general else []
    return f"To be judged, dense and pruned: {', '.join(asked)}; --no-judge leaves it out."


def _forgotten(session: ModelSession, selection: Selection) -> Forgotten:
    """What becomes of general prompts."""
    records, batch_size = general_records(), session.options.answers.batch_size
    with session.progress.phase("Judging by general prompts", 2 * len(records), "prompt") as advance:
        check = GeneralCheck(
            session.model, session.calibrator.tokeniser, batch_size=batch_size, records=records, advance=advance
        )
        with masked(session.model, selection) as model:
            found = check.compare(model, advance)
    check.close()
    return found
