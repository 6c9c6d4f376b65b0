"""The judgement at the end of a job that writes a model: what pruning did, on examples that nothing else has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.calibration.parts import FEWEST, MOST, Parts, three_parts
from shape_moe.calibration.reading import load, load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import UsageError
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.conclusion import conclude
from shape_moe.evaluation.forgotten import Forgotten, general_records
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.outcomes import FREE_ANSWERS, Seen
from shape_moe.evaluation.questions import Questions
from shape_moe.evaluation.verdict import MAX_DROP, Verdict, check_max_drop, check_requirement, not_measured
from shape_moe.jobs.held_out import held_out_set
from shape_moe.jobs.judging_plan import MINUTES, check_minutes, plan_judging
from shape_moe.jobs.seen_examples import seen_records
from shape_moe.jobs.session import ModelSession
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from shape_moe.units import capitalised

ADVICE = "Judge it by examples that it was not made from: shape-moe evaluate MODEL DIR --data FILE."


@dataclass(frozen=True)
class JudgementOptions:
    """How a model is judged when it is written.

    Attributes:
        max_drop: the fall, as a share, that *safe* allows.
        require: ``safe`` or ``no-loss``: what the verdict must be; None for nothing.
        examples: judge by at most this many.
        answers: let both models answer at most so many of them freely.
        general: ask general prompts as well.
        minutes: the longest that it may take: of what would take longer, less is judged, and that is said. None for
            any time.

    Raises:
        UsageError: for a ``max_drop`` outside (0, 1), another requirement, and numbers that are too small.
    """

    max_drop: float = MAX_DROP
    require: str | None = None
    examples: int = MOST
    answers: int = FREE_ANSWERS
    general: bool = True
    minutes: float | None = MINUTES

    def __post_init__(self) -> None:
        check_max_drop(self.max_drop)
        if self.require is not None:
            check_requirement(self.require)
        check_minutes(self.minutes)
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


def set_aside(
    data: DataOptions,
    options: JudgementOptions,
    *,
    choice: int = 0,
    give_up: bool,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Parts:
    """Tell the records of a source apart: to calibrate, to choose by and to report by.

    Args:
        data: the source, with the number of records to calibrate with.
        options: how many to report by.
        choice: how many to choose by.
        give_up: whether the calibration sample may give up records where the source has no others.
        seed: draws the parts.
        progress: where to say what the source holds.

    Raises:
        DataError: when the source cannot be read, or too few records are left to choose by.
    """
    if data.samples is None:
        everything = load_records(data, progress)
        return three_parts(
            everything, calibration=len(everything), choice=choice, most=options.examples, give_up=give_up, seed=seed
        )
    loaded = load(replace(data, samples=data.samples + choice), progress)
    label = (loaded.label or "") if data.label is None else data.label
    more = load_records(replace(data, samples=data.samples + choice + options.examples, label=label))
    wanted, known = loaded.records, {record.index for record in loaded.records}
    beyond = [record for record in more if record.index not in known]
    return three_parts(
        wanted, beyond, calibration=data.samples, choice=choice, most=options.examples, give_up=give_up, seed=seed
    )


def judge_selection(
    session: ModelSession,
    parts: Parts,
    data: DataOptions,
    selection: Selection,
    options: JudgementOptions,
    seen: SeenPrompts | None = None,
    remarks: Sequence[str] = (),
) -> Judgement:
    """Judge one selection; see :func:`judge_selections`."""
    return judge_selections(session, parts, data, [selection], options, seen, remarks)[0]


def judge_selections(
    session: ModelSession,
    parts: Parts,
    data: DataOptions,
    selections: Sequence[Selection],
    options: JudgementOptions,
    seen: SeenPrompts | None = None,
    remarks: Sequence[str] = (),
) -> list[Judgement]:
    """Judge selections as masks on the dense model, beside that, by the same examples; the dense model answers once.

    Args:
        session: gives the dense model.
        parts: the records to report by, and why some classes have none.
        data: where they come from.
        selections: what the written models keep.
        options: see :class:`JudgementOptions`; its minutes are for all of them together.
        seen: the prompts that they were calibrated with, None where they are not known.
        remarks: what else a reader should know.
    """
    reasons = why_parts_unmeasured(parts)
    if not parts.report:
        return [no_judgement(f"{capitalised('; '.join(reasons))}.", options)] * len(selections)
    progress = session.progress
    general = len(general_records()) if options.general else 0
    maker = session.calibrator_of(parts.report, data)
    again = seen_records(parts)
    plan = plan_judging(
        session,
        maker,
        answers=options.answers,
        calls=options.answers,
        general=general,
        others=len(selections),
        minutes=options.minutes,
        seen=session.calibrator_of(again, data) if again else None,
    )
    progress.note(f"{plan.sentence}; --no-judge leaves it out.")
    notes = [*(f"Not measured: {reason}." for reason in reasons), f"{parts.sentence}.", *remarks]
    notes += [plan.note] if plan.note else []
    held_out = held_out_set(session, plan.maker, "the judgement")
    by_index = {record.index: record for record in parts.report}
    records = [by_index[example.index] for example in held_out.examples]
    generation, model = GenerationOptions(plan.amounts.answers), session.model
    with Bench(model, session.tokenizer, held_out, generation=generation, progress=progress) as bench:
        theirs = bench.dense_answers
        calibrated = _scored_again(session, plan.seen, selections)
        questions = Questions(
            model,
            session.calibrator.tokeniser,
            records,
            general=plan.amounts.general,
            most=plan.amounts.calls,
            batch_size=session.options.answers.batch_size,
            progress=progress,
        )
        found = []
        for selection, known in zip(selections, calibrated, strict=True):
            name = "the pruned model" if len(selections) == 1 else f"the model of keep {selection.keep_asked:g}"
            with progress.phase(f"Judging {name}", len(held_out.examples), "example") as advance:
                sums, ours = bench.sums(selection, advance), bench.answers(selection)
            with masked(model, selection):
                replies = questions.ask(model, name, seen)
            verdict = conclude(
                held_out,
                bench.dense_sums,
                sums,
                (theirs, ours) if theirs is not None and ours is not None else None,
                calls=replies.calls,
                calling=questions.calling,
                max_drop=options.max_drop,
                notes=notes,
                seen=known,
            )
            if (blamed := _blamed_on_pooling(verdict, selection)) is not None:
                verdict = replace(verdict, notes=(blamed, *verdict.notes))
            found.append(Judgement(verdict, replies.forgotten))
        questions.close()
    return found


def _scored_again(
    session: ModelSession, maker: ExampleMaker | None, selections: Sequence[Selection]
) -> list[Seen | None]:
    """What the dense and each pruned model make of examples that calibration has seen; None each without such."""
    if maker is None:
        return [None] * len(selections)
    held_out = held_out_set(session, maker, "examples that calibrated")
    with Bench(session.model, session.tokenizer, held_out, progress=session.progress) as bench:
        return [Seen(held_out.groups, bench.dense_sums, bench.sums(one), bench.answered) for one in selections]


def _blamed_on_pooling(verdict: Verdict, selection: Selection) -> str | None:
    """What to say where classes were added up and one of them was lost."""
    if not selection.pooled or not verdict.suspects:
        return None
    return (
        f"Lost most: {', '.join(verdict.suspects)}. The classes were added up, as published, so that one is paid for "
        "with another: without --preset paper and --pool-classes each is kept for its own sake."
    )


def why_parts_unmeasured(parts: Parts) -> list[str]:
    """Why classes have no records to report by, each by its name where it has one."""
    return [f"{group}: {why}" if group else why for group, why in parts.unmeasured.items()]


def no_judgement(reason: str, options: JudgementOptions) -> Judgement:
    """The judgement where nothing could be measured."""
    return Judgement(not_measured(reason, ADVICE, max_drop=options.max_drop))
