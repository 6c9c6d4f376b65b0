"""Where verdicts turn: the numbers of examples and answers at which a word changes, and what the intervals hold for."""

from __future__ import annotations

import numpy as np
import pytest

from shape_moe.evaluation.falls import Agreement, FreeAnswers, Outcome, Pairs
from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.intervals import Bootstrap, quantile, wilson_interval
from shape_moe.evaluation.verdict import Verdict, Word, decide


def answers(count: int = 16, looping: int = 0, endless: int = 0, tokens: tuple[int, int] = (100, 100)) -> FreeAnswers:
    bad = looping + endless
    return FreeAnswers(Pairs(count, count, bad, 0), (0, looping), (0, endless), tokens, (2,) * bad)


def one(lost: int, count: int, name: str = "", made: FreeAnswers | None = None, **more) -> Outcome:
    return Outcome(name, count, Pairs(count, count, lost, 0), answers=made or answers(), **more)


def test_a_class_of_four_is_measured_and_one_of_thirty_can_be_safe() -> None:
    assert [decide([one(0, count)]).word for count in (3, 4)] == [Word.NOT_MEASURED, Word.NO_LOSS]
    words = [decide([one(0, count)], max_drop=0.5).word for count in (29, 30)]
    assert words == [Word.NO_LOSS, Word.SAFE]
    assert "Judge by 30 examples" in decide([one(0, 29)], max_drop=0.5).advice


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (answers(8, 1), Word.LOSS),  # one answer of few proves no damage
        (answers(8, 2), Word.DAMAGED),
        (answers(8, 0, 2), Word.DAMAGED),
        (answers(20, 2), Word.LOSS),  # a tenth of them
        (answers(19, 2), Word.DAMAGED),
        (answers(50, 1), Word.SAFE),  # one in fifty
        (answers(49, 1), Word.LOSS),
    ],
)
def test_answers_that_loop_or_do_not_end(made, word) -> None:
    assert decide([one(0, 400, made=made)]).word is word


def test_answers_of_another_length_both_ways() -> None:
    for tokens, word in (((100, 124), Word.SAFE), ((100, 126), Word.NO_LOSS), ((100, 76), Word.SAFE)):
        assert decide([one(0, 400, made=answers(tokens=tokens))]).word is word
    shorter = decide([one(0, 400, made=answers(tokens=(100, 70)))])
    assert shorter.word is Word.NO_LOSS
    assert "Free answers are 30 % shorter than the dense model's." in shorter.notes
    assert answers(16, tokens=(0, 8)).lengthening == 0.5  # of nothing, per answer


def test_reasons_where_nothing_was_measured() -> None:
    assert decide([one(0, 3)]).reason == "There are 3 examples to judge by, and a class needs 4 at least."
    assert "hold no token that could be scored" in decide([Outcome("", 4)]).reason


def test_the_class_with_the_widest_interval_speaks_for_all() -> None:
    safe = decide([one(0, 500, "many"), one(0, 300, "few")])
    assert safe.word is Word.SAFE
    assert safe.reason.startswith("Exact match in few falls by ")
    few = decide([one(0, 60, "many"), one(0, 40, "few")])
    assert few.reason.startswith("40 examples of few: a loss of up to ")
    assert few.advice == "Judge by 247 examples for each class."


def test_enough_examples_that_are_not_safe_all_the_same() -> None:
    found = decide([Outcome("", 500, Pairs(500, 500, 0, 0))])
    assert (found.word, found.advice) == (Word.NO_LOSS, "Judge by more examples.")


def test_intervals_hold_for_all_falls_that_were_measured() -> None:
    calls = {"right": Pairs(40, 40, 0, 0)}
    made = [one(0, 400, "a", calls=calls), one(0, 400, "b"), one(0, 3, "c"), Outcome("d", 50)]
    found = decide(made)
    assert found.comparisons == len(found.falls) == 3
    assert {fall.figure for fall in found.falls} == {"exact match", "right tool calls"}
    assert found.falls[0].fall.high == pytest.approx(quantile(3) ** 2 / (40 + quantile(3) ** 2), rel=1e-9)


def test_tool_calls_are_told_first_and_worst_classes_first() -> None:
    calls = {"right": Pairs(40, 40, 12, 0), "made": Pairs(40, 40, 12, 0)}
    found = decide([one(60, 600, calls=calls)])
    assert found.word is Word.LOSS
    assert found.reason.startswith("Right tool calls fall from 100 % to 70 %")
    names = [fall.name for fall in decide([one(4, 80, "b"), one(2, 40, "c"), one(2, 40, "a"), one(0, 40, "d")]).falls]
    assert names == ["a", "c", "b", "d"]  # of equal falls the less certain one


def test_free_answers_add_up() -> None:
    one, other = answers(8, 1, 2, (80, 90)), answers(5, 2, 0, (50, 41))
    assert one + other == FreeAnswers(Pairs(13, 13, 5, 0), (0, 3), (0, 2), (130, 131), (2,) * 5)
    verdict = Verdict(Word.LOSS, "", outcomes=(Outcome("a", 9, answers=one), Outcome("b", 9, answers=other)))
    assert verdict.answers == one + other


@pytest.mark.parametrize(
    ("tokens", "agree"), [([4, 4], [4, 1]), ([1, 2, 30, 0], [0, 2, 24, 0]), ([7, 9, 5], [3, 9, 1])]
)
def test_an_agreement_by_hand(tokens, agree) -> None:
    found, rows = Agreement.of(tokens, agree), [(t, t - a) for t, a in zip(tokens, agree, strict=True) if t]
    total = sum(t for t, _ in rows)
    share = sum(d for _, d in rows) / total
    variance = sum((d - share * t) ** 2 for t, d in rows) * len(rows) / (len(rows) - 1)
    assert found.share == pytest.approx(share, rel=1e-12)
    assert found.examples == pytest.approx(total**2 / sum(t * t for t, _ in rows), rel=1e-12)
    assert found.error == pytest.approx(variance**0.5 / total, rel=1e-12)
    low, high = wilson_interval(share, found.examples, 1.96)
    fall = found.fall(1.96)
    assert fall.high == pytest.approx(high, rel=1e-12)
    assert fall.low == pytest.approx(max(0.0, min(low, share - 1.96 * found.error)), abs=1e-12)
    assert Agreement.of([5], [4]).error == 1.0
    assert Agreement.of([0, 0], [0, 0]) is None


@pytest.mark.parametrize(("share", "count", "z"), [(0.1, 50, 1.96), (0.0, 30, 1.96), (1.0, 12, 2.5), (0.43, 7.5, 1.0)])
def test_wilsons_interval_is_where_the_share_is_z_deviations_away(share, count, z) -> None:
    for end in wilson_interval(share, count, z):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, abs=1e-12)
    low, high = wilson_interval(share, count, z)
    assert low <= share <= high
    assert low < high


def test_resamples_without_a_denominator_are_left_out_and_tails_shared_by_comparisons() -> None:
    above, below = np.array([1.0, 0.0, 0.0, 0.0]), np.array([2.0, 0.0, 0.0, 0.0])
    found = Bootstrap(4, seed=1).ratio(above, below)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    sample = np.random.default_rng(0).normal(size=40)
    draws = Bootstrap(40, seed=3, comparisons=4)
    means = draws.weights @ sample / 40
    wide = draws.ratio(sample, np.ones(40))
    assert (wide.low, wide.high) == pytest.approx(tuple(np.quantile(means, (0.00625, 0.99375))), rel=1e-12)
    fewer = draws.of(10)
    assert (fewer.examples, fewer.seed, fewer.comparisons) == (10, 3, 4)
    assert draws.of(40) is draws


def test_free_answers_are_counted_from_what_was_written() -> None:
    def written(ended: list[int], looped: list[int], texts: tuple[tuple[int, ...], ...]) -> Generated:
        flags = np.array(ended, dtype=bool), np.array(looped, dtype=bool)
        return Generated((1, 4, 5, 8), texts, 9, *flags, np.ones(4, dtype=bool))

    dense = written([1, 1, 1, 0], [0, 0, 1, 0], ((1, 2), (3,), (4, 4, 4), (5, 6)))
    pruned = written([1, 0, 0, 1], [0, 0, 1, 1], ((1, 2), (3, 7, 7), (4, 9), ()))
    found = FreeAnswers.of(dense, pruned)
    assert found == FreeAnswers(Pairs(4, 2, 1, 0), (1, 2), (1, 2), (8, 7), (1, 1, 0))
    assert (found.count, found.excess, found.median_divergence) == (4, 1, 1.0)
    assert FreeAnswers.of(dense, pruned, [4, 8, 9]) == FreeAnswers(Pairs(2, 1, 1, 0), (0, 1), (1, 1), (3, 3), (1, 0))
    assert FreeAnswers.of(dense, pruned, [0, 2]) is None
