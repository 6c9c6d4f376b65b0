"""What judging will take, by hand; and what speed is measured on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shape_moe.calibration.examples import Example
from shape_moe.evaluation.forgotten import ANSWER_TOKENS
from shape_moe.evaluation.judging_time import Amounts, Speed, Workload, left_out, pilot_set
from shape_moe.evaluation.tool_check import ANSWER_TOKENS as CALL_TOKENS

DRAFTS = (
    Example.answered(0, "a", (5,) * 20, 12),  # 8 tokens of response
    Example(1, "b", (5,) * 30, ((10, 15), (20, 30))),  # 15 in two turns, 10 in the last
    Example(2, "c", (5,) * 10),  # its response is still to be written
    Example(3, "d", (5,) * 40, plain=True),
)
WORK = Workload(DRAFTS, typical=6, batch_size=2, answer_rows=3, most_tokens=10_000, others=2)
SPEED = Speed(dense=0.5, other=0.25, steps={1: 100.0, 2: 2.0, 4: 7.0})
SCORED = (20 + 30 + (10 + 6) + 40) * (0.5 + 2 * 0.25)
RESPONSES = 6 * 2.0
"""One response of the typical length, by the step of two rows."""


@pytest.mark.parametrize(
    ("amounts", "seconds"),
    [
        (Amounts(4, 0), SCORED + RESPONSES),
        (Amounts(1, 0), 20 * 1.0),
        (Amounts(2, 0), (20 + 16) * 1.0 + RESPONSES),  # the first and the third
        # three models answer 8, 10 and 6 tokens at once, the step of two rows being the nearest to three (or of four)
        (Amounts(4, 3), SCORED + RESPONSES + 3 * 10 * 2.0 + 3 * 26.5 * 3 * 0.5),
        (Amounts(4, 2), SCORED + RESPONSES + 3 * 10 * 2.0 + 3 * 26.5 * 2 * 0.5),
        # three models write three calls of the longest turn, two at once
        (Amounts(4, 0, calls=3), SCORED + RESPONSES + 3 * (8 + 8) * 2.0 + 3 * 26.5 * 3 * 0.5),
        (Amounts(4, 0, general=5), SCORED + RESPONSES + 3 * 3 * ANSWER_TOKENS * 2.0 + 5 * (24 + ANSWER_TOKENS) * 1.0),
    ],
)
def test_seconds_by_hand(amounts, seconds) -> None:
    assert WORK.seconds(amounts, SPEED) == pytest.approx(seconds, rel=1e-12)


def test_tokens_and_turns_are_bounded() -> None:
    assert replace(WORK, most_tokens=50).seconds(Amounts(4, 0), SPEED) == pytest.approx(50 + RESPONSES, rel=1e-12)
    long = replace(WORK, drafts=(Example.answered(0, "a", (5,) * 2000, 1000),), others=1)
    expected = 2000 * 0.75 + 2 * CALL_TOKENS * 2.0 + 2 * 2000 * 0.5
    assert long.seconds(Amounts(1, 0, calls=1), SPEED) == pytest.approx(expected, rel=1e-12)


def test_speed_is_measured_on_examples_of_middling_length() -> None:
    lengths = (9, 1, 30, 4, 6, 2, 12, 20)
    drafts = [Example(i, str(i), tuple(range(length))) for i, length in enumerate(lengths)]
    drafts[4] = Example.answered(4, "4", tuple(range(6)), 5)
    found = pilot_set(drafts, 3, 7, 99)
    assert [len(example.tokens) for example in found.examples] == [4, 6, 9]
    assert [example.spans for example in found.examples] == [((2, 4),), ((5, 6),), ((5, 9),)]
    assert (found.batch_size, found.pad_id, found.vocabulary, found.groups) == (3, 7, 99, (None,) * 3)


def test_what_is_left_out_is_said() -> None:
    full = Amounts(1400, 32, 8, 200)
    assert left_out(full, full) == []
    assert left_out(full, Amounts(60, 16, 8, 22)) == [
        "60 of 1,400 examples", "16 of 32 free answers", "22 of 200 general prompts",
    ]  # fmt: skip
    assert left_out(full, replace(full, calls=1)) == ["1 of 8 examples with tools"]
