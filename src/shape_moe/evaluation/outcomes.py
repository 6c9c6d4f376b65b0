"""From the figures of single examples to what a verdict is decided on: outcomes by class."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shape_moe.evaluation.falls import Agreement, FreeAnswers, Likelihood, Outcome, Pairs
from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.tool_calls import ToolExample, compare_calls

FREE_ANSWERS = 32
"""At most so many answers are written freely, spread over the classes."""
FEW = 30
"""Of a class with fewer examples to report by, those that calibration has seen are looked at as well."""


@dataclass(frozen=True)
class Seen:
    """What both models make of examples that the pruned one was made from.

    They flatter it, so that they can raise a suspicion and never clear one.

    Attributes:
        groups: the class of each example, None where it has none.
        dense: the dense model's sums by example.
        pruned: the pruned model's.
        answered: the examples that have an answer to match.
    """

    groups: Sequence[str | None]
    dense: TeacherForced
    pruned: TeacherForced
    answered: Collection[int]

    def nll_of(self, name: str) -> NDArray[np.float64]:
        """Summed negative log-likelihoods of the answers of a class, float64 [2, answers], the dense model's first."""
        rows = [i for i in sorted(self.answered) if (self.groups[i] or "") == name]
        return np.array([self.dense.nll[rows], self.pruned.nll[rows]])


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
    by_answers: bool = False,
    seen: Seen | None = None,
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
        by_answers: whether exact match is that of free answers, which says nothing of the likelihood of the data's.
        seen: the same of examples that the pruned model was made from, None where it was not measured.
    """
    over = pruned.tokens if measured is None else measured
    names = [group or "" for group in groups]
    said = by_answers or measured is not None
    known = [Seen(groups, dense, pruned, set(answered) & set(left_out) - set(calling)), *([seen] if seen else [])]
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
                likelihood=None if said else _likelihood(np.array([dense.nll[exact], pruned.nll[exact]]), name, known),
            )
        )
    return found


def _likelihood(unseen: NDArray[np.float64], name: str, known: Sequence[Seen]) -> Likelihood | None:
    """Of answers that nothing has seen, [2, answers], and where they are few, of those that calibration has seen."""
    count = unseen.shape[1]
    if not 0 < count < FEW:
        return Likelihood.of(*unseen) if count else None
    together = np.concatenate([unseen, *(seen.nll_of(name) for seen in known)], axis=1)
    return Likelihood.of(*together, seen=together.shape[1] - count)
