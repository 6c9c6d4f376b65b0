from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.calibration.examples import Example
from shape_moe.evaluation.conclusion import conclude
from shape_moe.evaluation.falls import Pairs
from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.outcomes import outcomes
from shape_moe.evaluation.spread import spread_over_classes
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.tool_call_formats import ToolCall
from shape_moe.evaluation.tool_calls import ToolExample


def sums(exact, *, agree=None, kl=None) -> TeacherForced:
    count = len(exact)
    tokens = np.full(count, 10)
    agree = tokens if agree is None else np.array(agree)
    return TeacherForced(tokens, np.ones(count), np.array(kl or [0.0] * count), agree, np.array(exact, dtype=bool))


def written(answers, *, looped) -> Generated:
    count = len(answers)
    ended = ~np.array(looped)
    return Generated(tuple(range(0, 2 * count, 2)), answers, 9, ended, np.array(looped), np.ones(count, dtype=bool))


def test_examples_are_counted_by_class() -> None:
    groups = ["a", "b", "a", "b", "a", None]
    dense, pruned = (
        sums([1, 1, 1, 0, 1, 1]),
        sums([1, 0, 0, 1, 1, 1], agree=[10, 5, 8, 10, 10, 10], kl=[0, 2, 1, 0, 0, 0]),
    )
    answers = (
        written(((1, 2), (3, 4), (5, 6)), looped=[False] * 3),
        written(((1, 2), (3, 5), (6,)), looped=[False, True, False]),
    )
    call = (ToolCall("f", {}),)
    calls = {4: ToolExample((), call, call, ())}
    none, a, b = outcomes(groups, dense, pruned, answered=range(5), answers=answers, calls=calls, calling={4})
    assert [none.name, a.name, b.name] == ["", "a", "b"]
    assert a.examples == 3
    assert a.exact == Pairs(2, 2, 1, 0)
    assert b.exact == Pairs(2, 1, 1, 1)
    assert none.exact is None
    assert (a.agreement.share, b.agreement.share) == (pytest.approx(2 / 30), pytest.approx(5 / 20))
    assert (a.kl, b.kl) == (pytest.approx(1 / 30), pytest.approx(2 / 20))
    assert a.answers.healthy == Pairs(3, 3, 1, 0)
    assert a.answers.divergences == (1, 0)
    assert a.answers.tokens == (6, 5)
    assert b.answers is None
    assert a.calls["right"] == Pairs(1, 1, 1, 0)
    assert b.calls is None
    seen = outcomes(groups, dense, pruned, answered=range(5), answers=answers, left_out={0, 2, 4})
    assert [(outcome.name, outcome.examples) for outcome in seen] == [("", 1), ("a", 0), ("b", 2)]
    assert seen[1].exact is seen[1].agreement is seen[1].kl is seen[1].answers is None


def test_exact_match_by_answers_is_that_of_the_answers_alone() -> None:
    rows = tuple(Example.answered(i, str(i), (1, 2, 3), 1) for i in range(6))
    held_out = HeldOutSet("set", rows, (None,) * 6, 2)
    dense, pruned = sums([0, 0, 0, 0, 0, 0]), sums([0, 0, 0, 0, 0, 0])
    answers = [written(((1,), (2,), (3,)), looped=[False] * 3) for _ in range(2)]
    answers[1] = replace(answers[1], exact=np.array([True, False, True]))
    found = conclude(held_out, dense, pruned, tuple(answers), by_answers=True)
    assert found.outcomes[0].exact == Pairs(3, 3, 1, 0)
    plain = conclude(held_out, dense, pruned, tuple(answers))
    assert plain.outcomes[0].exact == Pairs(6, 0, 0, 0)


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=60), st.integers(1, 70))
def test_answers_are_spread_over_the_classes(groups, count) -> None:
    chosen = spread_over_classes(groups, range(len(groups)), count)
    assert len(chosen) == len(set(chosen)) == min(count, len(groups))
    shares = {group: sum(groups[i] == group for i in chosen) for group in set(groups)}
    for group, share in shares.items():
        assert share == groups.count(group) or share >= max(shares.values()) - 1
