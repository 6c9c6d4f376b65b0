"""From the figures of single examples to what a verdict is decided on: outcomes by class."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shape_moe.evaluation.falls import Agreement, FreeAnswers, Outcome, Pairs
from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.tool_calls import ToolExample, compare_calls

FREE_ANSWERS = 32
"""At most so many answers are written freely, spread over the classes."""


def outcomes(
    groups: Sequence[str | None],
    dense: TeacherForced,
    pruned: TeacherForced,
    *,
    answered: Collection[int],
    answers: tuple[Generated, Generated] | None = None,
    calls: Mapping[int, ToolExample] | None = None,
    calling: Collection[int] = (),
    left_out: Collection[int] = (),
    measured: NDArray[np.int64] | None = None,
) -> list[Outcome]:
    """What was measured, by class.

    Args:
        groups: the class of each example, None where it has none.
        dense: the dense model's sums by example.
        pruned: the pruned model's.
        answered: the examples that have an answer to match.
        answers: free answers, the dense model's first; None where none were made.
        calls: what both models did with examples that offer tools, by position.
        calling: examples whose answer calls a tool. They count for tool calls and not for exact match: a call is right
            when its arguments are, however they are written.
        left_out: examples that do not count, because calibration has seen them or something was chosen by them.
        measured: tokens of each example at which a lower bound of the KL divergence is known, where ``pruned`` holds
            such bounds; None where it holds the divergence itself, over all of its tokens.
    """
    over = pruned.tokens if measured is None else measured
    names = [group or "" for group in groups]
    found = []
    for name in sorted(set(names)):
        rows = [i for i, group in enumerate(names) if group == name and i not in left_out]
        exact = [i for i in rows if i in answered and i not in calling]
        tools = [calls[i] for i in rows if i in calls] if calls else []
        scored = int(over[rows].sum())
        found.append(
            Outcome(
                name,
                len(rows),
                Pairs.of(dense.exact[exact], pruned.exact[exact]) if exact else None,
                Agreement.of(pruned.tokens[rows], pruned.agree[rows]),
                float(pruned.kl[rows].sum()) / scored if scored else None,
                FreeAnswers.of(*answers, rows) if answers else None,
                compare_calls(tools) or None,
                kl_is_bound=measured is not None,
            )
        )
    return found
