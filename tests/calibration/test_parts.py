from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.calibration.parts import FEWEST, MOST, MOST_GIVEN_UP, three_parts, without_seen
from shape_moe.calibration.reading import sample_records
from shape_moe.calibration.records import DataOptions, Record, prompt_hash
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import DataError


def make(prompts, groups=None, start: int = 0) -> list[Record]:
    return [
        Record(start + i, f"line {i}", prompt=f"question {p}", response="x", group=groups and groups[i])
        for i, p in enumerate(prompts)
    ]


def hashes(records) -> set[str]:
    return {prompt_hash(record) for record in records}


@settings(max_examples=120, deadline=None)
@given(
    wanted=st.lists(st.tuples(st.integers(0, 90), st.sampled_from("abc")), min_size=1, max_size=120),
    beyond=st.lists(st.tuples(st.integers(0, 200), st.sampled_from("abc")), max_size=120),
    calibration=st.integers(4, 130),
    choice=st.sampled_from([0, 16, 64]),
    most=st.integers(12, 100),
    give_up=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_three_parts_share_no_prompt(wanted, beyond, calibration, choice, most, give_up, seed) -> None:
    first = make(*zip(*wanted, strict=True))
    others = make([p for p, _ in beyond], [g for _, g in beyond], start=len(first))
    options = {"calibration": calibration, "choice": choice, "most": most, "give_up": give_up, "seed": seed}
    try:
        parts = three_parts(first, others, **options)
    except DataError:
        assert choice
        return
    sides = [hashes(parts.calibration), hashes(parts.choice), hashes(parts.report)]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert sides[0] | sides[1] <= hashes(first)
    assert len(parts.report) == len(sides[2]) <= most
    assert len(parts.calibration) <= calibration
    assert len(parts.choice) <= choice
    assert parts == three_parts(first, others, **options)
    if not give_up:
        assert not sides[2] & hashes(first)
        if not choice:
            assert parts.calibration == first[:calibration]
    group_of = {prompt_hash(record): record.group for record in reversed(first)}
    for group, count in Counter(record.group for record in parts.report).items():
        assert count >= FEWEST
        assert group not in parts.unmeasured
        mine = {key for key, its_group in group_of.items() if its_group == group}
        assert len(sides[2] & mine) <= min(MOST_GIVEN_UP, len(mine) // 5)


def test_rows_beyond_the_sample_come_first() -> None:
    everything = make(range(600))
    wanted = sample_records(everything, DataOptions("x", samples=128))
    beyond = [record for record in everything if record not in wanted]
    parts = three_parts(wanted, beyond, calibration=128)
    assert parts.calibration == wanted
    assert len(parts.report) == MOST
    assert hashes(parts.report) <= hashes(beyond)
    assert parts.sentence == "400 examples to report by, which nothing else has seen"


def test_a_fifth_of_every_class_is_set_aside_where_nothing_lies_beyond() -> None:
    records = make(range(100), ["a"] * 70 + ["b"] * 30)
    parts = three_parts(records, calibration=100)
    assert Counter(record.group for record in parts.report) == {"a": 14, "b": 6}
    assert len(parts.calibration) == 80
    assert "20 of them given up by the calibration sample" in parts.sentence
    many = three_parts(make(range(1000)), calibration=1000)
    assert len(many.report) == MOST_GIVEN_UP


def test_a_few_rows_beyond_are_made_up_to_a_fifth() -> None:
    parts = three_parts(make(range(100)), make(range(200, 207), start=100), calibration=100)
    assert len(parts.report) == 20
    assert len(parts.calibration) == 87


def test_a_sample_that_is_named_is_never_given_up() -> None:
    records = make(range(25))
    parts = three_parts(records, make(range(100, 102), start=25), calibration=25, give_up=False)
    assert parts.calibration == records
    assert parts.report == []
    assert parts.unmeasured == {"": "the calibration sample is kept whole, and the data holds only 2 other prompts"}


def test_too_few_are_not_measured_and_not_given_up() -> None:
    records = make(range(39), ["a"] * 19 + ["b"] * 20)
    parts = three_parts(records, calibration=39)
    assert list(parts.unmeasured) == ["a"]
    assert "19 different prompts are too few" in parts.unmeasured["a"]
    assert Counter(record.group for record in parts.report) == {"b": 4}
    assert len(parts.calibration) == 35


def test_what_is_chosen_by_is_drawn_from_what_remains() -> None:
    parts = three_parts(make(range(192)), make(range(500, 540), start=192), calibration=128, choice=64)
    assert (len(parts.calibration), len(parts.choice), len(parts.report)) == (128, 64, 40)
    assert "to calibrate with and 64 held out" in parts.sentence
    shrunk = three_parts(make(range(100)), calibration=128, choice=64)
    assert len(shrunk.report) == 20
    assert (len(shrunk.calibration), len(shrunk.choice)) == (53, 26)
    with pytest.raises(DataError, match="too few"):
        three_parts(make(range(7)), calibration=5, choice=4)


def test_the_parts_do_not_depend_on_the_order_of_records() -> None:
    records = make(range(80), ["a", "b"] * 40)
    one, other = (three_parts(rows, calibration=80, seed=4) for rows in (records, records[::-1]))
    assert one.report == other.report
    assert one.calibration == other.calibration[::-1]
    assert three_parts(records, calibration=80, seed=5).report != one.report


def test_the_loss_that_is_reported_is_unbiased() -> None:
    """Thirty candidates lose alike: the luckiest looks better where it was chosen, and as it is where it reports."""
    rng = np.random.default_rng(7)
    records = make(range(160))
    chosen, reported = [], []
    for seed in range(400):
        lost = rng.uniform(size=(30, 160)) < 0.1
        parts = three_parts(records, calibration=80, choice=48, seed=seed)
        choice, report = ([record.index for record in part] for part in (parts.choice, parts.report))
        best = int(lost[:, choice].mean(axis=1).argmin())
        chosen.append(lost[best, choice].mean())
        reported.append(lost[best, report].mean())
    error = np.std(reported) / np.sqrt(len(reported))
    assert abs(np.mean(reported) - 0.1) <= 4 * error
    assert np.mean(chosen) <= 0.06


def test_what_was_seen_elsewhere_does_not_report() -> None:
    records = make(range(24), ["a"] * 12 + ["b"] * 12)
    parts = three_parts([], records, calibration=0, give_up=False)
    used = [*records[:2], *records[12 : 12 + 13 - FEWEST]]
    found = without_seen(parts, SeenPrompts.of_records(used), "layer curves")
    assert [record.index for record in found.report] == list(range(2, 12))
    assert found.unmeasured == {"b": "too few examples are left that had no part in the layer curves"}
    assert found.sentence == (
        "10 examples to report by, which nothing else has seen; 11 more examples had a part in the layer curves and "
        "were left out"
    )
    assert without_seen(parts, SeenPrompts(), "layer curves") == parts
