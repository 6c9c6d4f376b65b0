"""How much is judged, and how long that takes: said before it starts, and kept within a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from shape_moe.architectures.loading import vocabulary_size
from shape_moe.calibration.example_maker import ExampleMaker
from shape_moe.calibration.parts import FEWEST
from shape_moe.calibration.responses import pad_token_id
from shape_moe.errors import UsageError
from shape_moe.evaluation.generation import longest_answer
from shape_moe.evaluation.judging_time import (
    Amounts,
    Workload,
    amounts_within,
    left_out,
    measure_speed,
    pilot_set,
)
from shape_moe.evaluation.outcomes import FREE_ANSWERS
from shape_moe.evaluation.spread import spread_over_classes
from shape_moe.evaluation.tool_check import tools_of
from shape_moe.jobs.session import ModelSession
from shape_moe.units import counted, joined, readable_duration

MINUTES = 5.0
"""A model that was just written is judged within so many minutes, unless told otherwise."""
LEAST = Amounts(examples=4 * FEWEST, answers=16, calls=8, general=22)
"""Less than this is never judged, whatever it takes: two general prompts of each kind."""
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class JudgingPlan:
    """What will be judged.

    Attributes:
        maker: the examples.
        amounts: how much of everything.
        seconds: how long that will take; None where it could not be told.
        note: what had to be left out to stay within the time; empty where nothing was.
        seen: examples that calibration has seen and that are looked at again; None for none.
    """

    maker: ExampleMaker
    amounts: Amounts
    seconds: float | None
    note: str = ""
    seen: ExampleMaker | None = None

    @property
    def sentence(self) -> str:
        """What is about to be done and how long it takes, for people."""
        asked = [counted(self.amounts.examples, "example")]
        asked += [f"up to {counted(self.amounts.answers, 'free answer')}"] if self.amounts.answers else []
        asked += [counted(self.amounts.general, "general prompt")] if self.amounts.general else []
        text = f"{self.note} " if self.note else ""
        asked += [f"{len(self.seen.drafts):,} of those that calibrated"] if self.seen is not None else []
        text += f"Judging the dense and the pruned model: {joined(asked)}"
        return text if self.seconds is None else f"{text}; this takes about {readable_duration(self.seconds)}"


def check_minutes(minutes: float | None) -> None:
    """Whether judging can be told to stay within a time.

    Raises:
        UsageError: for a time that is not above 0.
    """
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--judge-minutes must be above 0, not {minutes:g}.")


def plan_judging(
    session: ModelSession,
    maker: ExampleMaker,
    *,
    answers: int,
    calls: int = FREE_ANSWERS,
    general: int,
    others: int = 1,
    minutes: float | None = MINUTES,
    seen: ExampleMaker | None = None,
) -> JudgingPlan:
    """Measure how fast the model is, and tell how long judging will take; of what takes longer, do less.

    Args:
        session: gives the dense model.
        maker: the examples to judge by.
        answers: how many free answers at most.
        calls: how many examples that offer tools are asked with them at most.
        general: how many general prompts.
        others: how many models are judged beside the dense one.
        minutes: the longest time, None for any.
        seen: examples to look at again, where there is time for them beside everything else.
    """
    drafts, records = maker.drafts, maker.records
    answerable = sum(not draft.plain for draft in drafts)
    offering = sum(bool(tools_of(record)) for record in records)
    full = Amounts(len(drafts), min(answers, answerable), min(calls, offering), general)
    if not any(len(draft.tokens) > 1 for draft in drafts):
        return JudgingPlan(maker, full, None, seen=seen)
    model, batch_size = session.model, maker.options.batch_size
    pilot = pilot_set(drafts, batch_size, pad_token_id(model, maker.tokeniser), vocabulary_size(model))
    typical = _typical_answer(session, maker)
    written = longest_answer(max([*(len(draft.response) for draft in drafts), typical]))
    answer_rows = pilot.rows_of(written + max(draft.prompt_length for draft in drafts))
    speed = measure_speed(model, pilot, [batch_size, min(answer_rows, max(full.answers, 1))], clock)
    work = Workload(drafts, typical, batch_size, answer_rows, maker.options.max_tokens, others)
    limit = None if minutes is None else 60 * minutes
    groups = [record.group for record in records]
    least = Amounts(LEAST.examples * len(set(groups)), LEAST.answers, LEAST.calls, LEAST.general)
    amounts, seconds = amounts_within(full, least, limit, lambda amounts: work.seconds(amounts, speed))
    if amounts == full:
        tokens = sum(len(draft.tokens) for draft in seen.drafts) if seen is not None else 0
        again = tokens * (speed.dense + others * speed.other)
        if limit is None or seconds + again <= limit:
            return JudgingPlan(maker, amounts, seconds + again, seen=seen)
        return JudgingPlan(maker, amounts, seconds)
    assert minutes is not None
    note = (
        f"Judging everything would take about {readable_duration(work.seconds(full, speed))}; to stay within "
        f"{minutes:g} min "
    )
    note += f"(--judge-minutes), only {joined(left_out(full, amounts))} are used."
    chosen = [records[i] for i in spread_over_classes(groups, range(len(records)), amounts.examples)]
    return JudgingPlan(session.calibrator_of(chosen, maker.data), amounts, seconds, note)


def _typical_answer(session: ModelSession, maker: ExampleMaker) -> int:
    """Tokens of an answer that the dense model has yet to write.

    As many as those have that it has written, or that are given; where there are none, the most that it may write.
    """
    most = maker.options.max_new_tokens
    for known in (session.calibrator.examples, maker.drafts):
        lengths = [len(example.response) for example in known if example.spans]
        if lengths:
            return min(round(fmean(lengths)), most) if most else 0
    return most
