"""What a trace says of the prompts that it was made from."""

from __future__ import annotations

import pytest

from shape_moe.calibration.records import Record, prompt_hash
from shape_moe.calibration.seen_prompts import SeenPrompts, new_salt, salted_hash
from shape_moe.errors import CheckpointError


def asked(text: str) -> Record:
    return Record(0, "elsewhere", prompt=text, response="any")


def source(*texts: str, salt: str | None = None) -> dict:
    salt = new_salt() if salt is None else salt
    return {"salt": salt, "prompts": [salted_hash(asked(text), salt) for text in texts]}


def test_salted_prompts_are_recognised_whatever_their_spacing_and_response() -> None:
    seen = SeenPrompts.of_source(source("what is it", "and this"))
    assert seen.complete
    assert Record(9, "x", prompt="what  is\tit", response="other") in seen
    assert asked("what is that") not in seen
    assert seen.count([asked("and this"), asked("new"), asked("what is it")]) == 2


def test_two_traces_of_the_same_prompts_share_no_hash() -> None:
    first, second = source("a", "b"), source("a", "b")
    hashes = {*first["prompts"], *second["prompts"], prompt_hash(asked("a")), prompt_hash(asked("b"))}
    assert len(hashes) == 6
    assert all(len(value) == 16 for value in hashes)


def test_hashes_without_a_salt_still_count() -> None:
    """The first traces kept them so."""
    old = {"prompts": [prompt_hash(asked("a"))]}
    assert asked("a") in SeenPrompts.of_source(old)
    assert asked("b") not in SeenPrompts.of_source(old)


def test_parts_of_merged_traces_keep_their_salts() -> None:
    old = {"prompts": [prompt_hash(asked("c"))]}
    inner = {"merged": [{"weight": 1.0, **source("a")}, {"weight": 1.0, **source("b")}]}
    seen = SeenPrompts.of_source({"merged": [inner, old]})
    assert [asked(text) in seen for text in "abcd"] == [True, True, True, False]
    assert seen.complete
    partly = SeenPrompts.of_source({"merged": [source("a"), {"data": "converted"}]})
    assert not partly.complete
    assert asked("a") in partly


def test_records_at_hand() -> None:
    seen = SeenPrompts.of_records([asked("a"), asked("b")])
    assert [asked(text) in seen for text in "abc"] == [True, True, False]


@pytest.mark.parametrize("damaged", [{"prompts": 3}, {"prompts": [1]}, {"salt": 1, "prompts": []}, {"merged": "x"}])
def test_damaged_sources_are_refused(damaged) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        SeenPrompts.of_source(damaged)
