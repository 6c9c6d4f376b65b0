from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.calibration.records import Record, prompt_hash
from shape_moe.calibration.split import split_records
from shape_moe.errors import DataError


def make(prompts: list[str]) -> list[Record]:
    return [Record(i, f"line {i}", prompt=prompt, response="x") for i, prompt in enumerate(prompts)]


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 60), min_size=40, max_size=120),
    calibration=st.integers(4, 60),
    held_out=st.integers(4, 60),
    seed=st.integers(0, 5),
)
def test_no_prompt_is_on_both_sides(prompts, calibration, held_out, seed) -> None:
    records = make([f"question {p}" for p in prompts])
    try:
        split = split_records(records, calibration, held_out, seed=seed)
    except DataError:
        different = len(set(prompts))
        share = min(1.0, different / (calibration + held_out))
        assert min(calibration, held_out) * share < 4.5
        return
    first = {prompt_hash(record) for record in split.calibration}
    second = {prompt_hash(record) for record in split.held_out}
    assert not first & second
    assert len(first) == len(split.calibration) <= calibration
    assert len(second) == len(split.held_out) <= held_out
    assert [r.index for r in split.calibration] == sorted(r.index for r in split.calibration)
    again = split_records(records, calibration, held_out, seed=seed)
    assert again == split


def test_the_split_does_not_depend_on_the_order_of_records() -> None:
    records = make([f"question {i}" for i in range(50)])
    one, other = split_records(records, 20, 20, seed=3), split_records(records[::-1], 20, 20, seed=3)
    assert one.calibration == other.calibration
    assert one.held_out == other.held_out


def test_repeated_prompts_are_counted() -> None:
    split = split_records(make([f"q {i % 20}" for i in range(30)]), 10, 10)
    assert "10 records repeat a prompt" in split.sentence
    assert len(split.calibration) == len(split.held_out) == 10


def test_few_examples_are_shared_out_alike() -> None:
    split = split_records(make([f"q {i}" for i in range(30)]), 40, 20)
    assert len(split.calibration) == 20
    assert len(split.held_out) == 10


def test_too_few_are_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        split_records(make(["a", "b", "c", "d", "e"]), 3, 2)
