"""The verdict over a set of examples, from what was measured on each of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.outcomes import Seen, outcomes
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.tool_calls import ToolExample
from shape_moe.evaluation.verdict import MAX_DROP, Verdict, decide, not_measured
from shape_moe.units import counted


def conclude(
    held_out: HeldOutSet,
    dense: TeacherForced,
    pruned: TeacherForced,
    answers: tuple[Generated, Generated] | None,
    *,
    by_answers: bool = False,
    calls: Mapping[int, ToolExample] | None = None,
    calling: Collection[int] = (),
    left_out: Collection[int] = (),
    max_drop: float = MAX_DROP,
    notes: Sequence[str] = (),
    seen: Seen | None = None,
) -> Verdict:
    """The verdict on a model.

    Args:
        held_out: the examples.
        dense: the dense model's sums by example.
        pruned: the model's.
        answers: free answers, the dense model's first; None where none were made.
        by_answers: take exact match from free answers: where only a part of an answer must be right, it has to be
            written.
        calls: what both models did with examples that offer tools, by position.
        calling: examples whose answer calls a tool.
        left_out: examples that do not count, because calibration has seen them or something was chosen by them.
        max_drop: the fall, as a share, that *safe* allows.
        notes: what else a reader should know.
        seen: what both models make of other examples, which the model was made from; None where that is not known.
    """
    answered: Collection[int] = held_out.answered()
    if by_answers and answers is not None:
        dense, pruned = (_by_answers(sums, made) for sums, made in zip((dense, pruned), answers, strict=True))
        answered = answers[0].positions
    return conclude_over(
        held_out.groups,
        dense,
        pruned,
        answers,
        answered=answered,
        calls=calls,
        calling=calling,
        left_out=left_out,
        max_drop=max_drop,
        notes=notes,
        by_answers=by_answers,
        seen=seen,
    )


def conclude_over(
    groups: Sequence[str | None],
    dense: TeacherForced,
    pruned: TeacherForced,
    answers: tuple[Generated, Generated] | None,
    *,
    answered: Collection[int],
    calls: Mapping[int, ToolExample] | None = None,
    calling: Collection[int] = (),
    left_out: Collection[int] = (),
    max_drop: float = MAX_DROP,
    notes: Sequence[str] = (),
    measured: NDArray[np.int64] | None = None,
    by_answers: bool = False,
    seen: Seen | None = None,
) -> Verdict:
    """As :func:`conclude`, of examples by their classes.

    Args:
        groups: the class of each example, None where it has none.
        dense: the dense model's sums by example.
        pruned: the model's.
        answers: free answers, the dense model's first; None where none were made.
        answered: the examples that have an answer to match.
        calls: see :func:`conclude`, as for all that follow.
        calling: likewise.
        left_out: likewise.
        max_drop: likewise.
        notes: likewise.
        measured: see :func:`shape_moe.evaluation.outcomes.outcomes`.
        by_answers: likewise.
        seen: see :func:`conclude`.
    """
    count = len(groups)
    if left_out and len(set(left_out)) == count:
        reason = f"The model was made from all of the {counted(count, 'example')}."
        return not_measured(reason, "Judge by examples that it has not seen.", max_drop=max_drop)
    found = outcomes(
        groups,
        dense,
        pruned,
        answered=answered,
        answers=answers,
        calls=calls,
        calling=calling,
        left_out=left_out,
        measured=measured,
        by_answers=by_answers,
        seen=seen,
    )
    known = len(set(left_out))
    said = [f"{known} of {count} examples do not count, because the model was made from them."] if known else []
    return decide(found, max_drop=max_drop, notes=[*said, *notes])


def _by_answers(sums: TeacherForced, made: Generated) -> TeacherForced:
    """Sums whose exact match is that of free answers."""
    exact = np.zeros(len(sums.exact), dtype=bool)
    exact[list(made.positions)] = made.exact
    return replace(sums, exact=exact)
