from __future__ import annotations

import json
import re
from math import comb, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shape_moe.errors import UsageError
from shape_moe.evaluation.falls import Agreement, FreeAnswers, Likelihood, Outcome, Pairs, first_divergence
from shape_moe.evaluation.intervals import examples_for, quantile, score_interval
from shape_moe.evaluation.outcomes import Seen, outcomes
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.verdict import Verdict, Word, decide, not_measured
from shape_moe.units import readable_kl, readable_share, share_at_most

SEVERITY = {Word.SAFE: 0, Word.NO_LOSS: 1, Word.LOSS: 2, Word.DAMAGED: 3}


def answers(count: int = 16, bad: int = 0, dense_bad: int = 0, length: float = 1.0) -> FreeAnswers:
    """Free answers of which some end in a loop, those of the dense model among them."""
    healthy = Pairs(count, count - dense_bad, max(bad - dense_bad, 0), max(dense_bad - bad, 0))
    return FreeAnswers(healthy, (dense_bad, bad), (0, 0), (10 * count, round(10 * count * length)), (3,) * bad)


def one(lost: int, gained: int, count: int, *, dense: int | None = None, name: str = "", made=None) -> Outcome:
    right = count - gained if dense is None else dense
    return Outcome(name, count, Pairs(count, right, lost, gained), answers=answers() if made is None else made)


measured = st.builds(
    lambda right, lost, wrong, gained: one(min(lost, right), min(gained, wrong), right + wrong, dense=right),
    st.integers(20, 300),
    st.integers(0, 40),
    st.integers(0, 20),
    st.integers(0, 20),
)


@settings(max_examples=150, deadline=None)
@given(measured, st.integers(1, 30))
def test_more_losses_never_make_a_better_verdict(outcome, more) -> None:
    exact = outcome.exact
    worse = one(min(exact.lost + more, exact.dense), exact.gained, exact.count, dense=exact.dense)
    assert SEVERITY[decide([worse]).word] >= SEVERITY[decide([outcome]).word]


@settings(max_examples=150, deadline=None)
@given(measured, st.integers(1, 300))
def test_more_examples_that_agree_never_make_a_worse_verdict(outcome, more) -> None:
    exact = outcome.exact
    longer = one(exact.lost, exact.gained, exact.count + more, dense=exact.dense + more)
    assert SEVERITY[decide([longer]).word] <= SEVERITY[decide([outcome]).word]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10), st.integers(1, 10), st.floats(0.001, 0.99))
def test_ten_examples_are_never_safe(lost, count, max_drop) -> None:
    assert decide([one(min(lost, count), 0, count)], max_drop=max_drop).word is not Word.SAFE


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 5000), st.integers(16, 32), st.integers(1, 32), st.integers(0, 3))
def test_a_model_that_loops_is_never_safe(count, made, bad, before) -> None:
    bad, before = min(bad, made), min(before, bad - 1)
    found = decide([one(0, 0, count, made=answers(made, bad, before))], max_drop=0.5)
    assert found.word in {Word.LOSS, Word.DAMAGED}
    if bad - before >= 4:
        assert found.word is Word.DAMAGED
        assert f"{bad} of {made} free answers end in a loop" in found.reason


@settings(max_examples=40, deadline=None)
@given(st.integers(200, 5000))
def test_likelihood_alone_is_never_safe(count) -> None:
    for outcome in (
        Outcome("", count, agreement=Agreement.of([9] * count, [9] * count), kl=0.0),
        Outcome("", count, exact=Pairs(count, count, 0, 0)),
    ):
        found = decide([outcome])
        assert found.word is Word.NO_LOSS
        assert any("likelihood alone" in note for note in found.notes)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([0.005, 0.01, 0.02, 0.05, 0.1]), st.integers(1, 7), st.booleans())
def test_the_named_number_of_examples_suffices_and_one_less_does_not(max_drop, classes, by_tokens) -> None:
    def judge(count: int) -> Verdict:
        agreement, exact = Agreement.of([7] * count, [7] * count), Pairs(count, count, 0, 0)
        figures = {"agreement": agreement} if by_tokens else {"exact": exact}
        made = [Outcome(f"class {i}", count, **figures, answers=answers()) for i in range(classes)]
        return decide(made, max_drop=max_drop)

    named = re.search(r"([\d,]+) without a loss would show", judge(31).reason)
    needed = int(named[1].replace(",", ""))
    assert needed == examples_for(max_drop, classes)
    assert judge(needed).word is Word.SAFE
    assert judge(needed - 1).word is Word.NO_LOSS


def test_what_is_not_excluded_is_said_with_the_examples_that_would_exclude_it() -> None:
    assert decide([one(0, 0, 32)], max_drop=0.01).reason == (
        "32 examples: a loss of up to 11 % is not excluded; 381 without a loss would show 1 %."
    )
    assert "3.2 % were lost, which can be chance" in decide([one(2, 0, 62)]).reason


def probability(word: Word, count: int, loss: float, **options) -> float:
    """How probable a verdict is where every answer is lost with this probability, by enumeration."""
    total = 0.0
    for lost in range(count + 1):
        chance = comb(count, lost) * loss**lost * (1 - loss) ** (count - lost)
        if chance > 1e-12 and decide([one(lost, 0, count)], **options).word is word:
            total += chance
    return total


@pytest.mark.parametrize(("count", "loss"), [(200, 0.02), (400, 0.021), (900, 0.025)])
def test_a_model_that_loses_more_than_allowed_is_rarely_called_safe(count, loss) -> None:
    assert probability(Word.SAFE, count, loss) <= 0.026


def test_damage_is_rarely_claimed_where_there_is_none() -> None:
    assert probability(Word.DAMAGED, 64, 0.1) <= 0.05
    assert probability(Word.DAMAGED, 64, 0.4) >= 0.99


def test_bounds_hold_for_all_classes_together() -> None:
    """Of models that change as many answers for the better as for the worse in eight classes, few lose measurably."""
    rng, found = np.random.default_rng(5), 0
    for _ in range(300):
        drawn = rng.multinomial(60, (0.06, 0.06, 0.88), size=8)
        made = [one(int(lost), int(gained), 60, dense=40, name=str(i)) for i, (lost, gained, _) in enumerate(drawn)]
        found += decide(made).word is not Word.NO_LOSS
    assert found / 300 <= 0.05


def test_the_worst_class_comes_first_and_decides() -> None:
    made = [one(0, 0, 64, name="good"), one(40, 0, 64, name="lost"), one(3, 0, 64, name="worse")]
    found = decide(made)
    assert [fall.name for fall in found.falls] == ["lost", "worse", "good"]
    assert found.word is Word.DAMAGED
    assert "in lost" in found.reason
    assert found.advice.endswith("of lost.")
    assert found.falls[0].fall.low == pytest.approx(score_interval(40, 0, 64, quantile(3))[0])


def test_names_of_classes_cannot_break_out_of_their_line() -> None:
    lines = decide([one(9, 0, 20, name="odd\n```\x1b[31m"), one(0, 0, 20)]).lines()
    assert all(line.isprintable() for line in lines)
    assert any(r"odd ```\x1b[31m" in line for line in lines)


def test_answers_of_one_class_that_loop_damage_the_model() -> None:
    made = [one(0, 0, 400, name="talk"), one(0, 0, 400, name="code", made=answers(16, 8))]
    found = decide(made)
    assert found.word is Word.DAMAGED
    assert found.reason.startswith("code: 8 of 16 free answers end in a loop")


def test_a_model_that_calls_no_tools_any_more_loses_measurably() -> None:
    calls = {"right": Pairs(24, 24, 24, 0), "made": Pairs(24, 24, 24, 0), "decision": Pairs(64, 64, 24, 0)}
    outcome = Outcome("", 400, Pairs(400, 400, 0, 0), answers=answers(), calls=calls)
    found = decide([outcome])
    assert found.word is Word.LOSS
    assert found.reason.startswith("It calls no tools any more. Right tool calls fall from 100 % to 0 %")
    assert "right decision to call or not 64 -> 40 of 64" in "\n".join(found.lines())
    assert decide([one(0, 0, 400)]).word is Word.SAFE


def test_three_models_that_are_not_safe_get_three_verdicts() -> None:
    loops = decide([one(0, 0, 400, made=answers(16, 12))])
    calls = {"right": Pairs(30, 30, 30, 0), "made": Pairs(30, 30, 30, 0)}
    silent = decide([Outcome("", 400, Pairs(400, 400, 0, 0), answers=answers(), calls=calls)])
    few = decide([one(0, 0, 10)])
    assert [loops.word, silent.word, few.word] == [Word.DAMAGED, Word.LOSS, Word.NO_LOSS]


def test_exact_match_counts_where_the_dense_model_reaches_half() -> None:
    agreement = Agreement.of([10] * 40, [10] * 40)
    for dense, figure in ((20, "exact match"), (19, "top-1 agreement")):
        found = decide([Outcome("", 40, Pairs(40, dense, 0, 0), agreement)])
        assert [fall.figure for fall in found.falls] == [figure]


def test_one_example_that_differs_proves_nothing() -> None:
    agree = [20] * 40
    for differing, word in ((1, Word.NO_LOSS), (3, Word.NO_LOSS), (8, Word.LOSS)):
        changed = [0] * differing + agree[differing:]
        found = decide([Outcome("", 40, agreement=Agreement.of([20] * 40, changed), answers=answers())])
        assert found.word is word


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=40))
def test_agreement_counts_examples_and_not_tokens(rows) -> None:
    tokens = np.array([count for count, _ in rows])
    agree = np.array([int(count * share) for count, share in rows])
    found = Agreement.of(tokens, agree)
    assert found.share == pytest.approx((tokens - agree).sum() / tokens.sum())
    assert found.examples <= len(rows) + 1e-9
    fall = found.fall(1.96)
    assert 0 <= fall.low <= fall.value + 1e-12
    assert fall.value <= fall.high + 1e-12
    tenfold = Agreement.of(tokens * 10, agree * 10)
    assert tenfold.fall(1.96).high == pytest.approx(fall.high)


def test_the_error_of_an_agreement_is_that_of_the_examples_drawn() -> None:
    rng = np.random.default_rng(1)
    tokens, rates = rng.integers(10, 60, (3000, 50)), rng.beta(1, 9, (3000, 50))
    agree = tokens - rng.binomial(tokens, rates)
    made = [Agreement.of(t, a) for t, a in zip(tokens, agree, strict=True)]
    assert np.mean([a.error for a in made]) == pytest.approx(np.std([a.share for a in made]), rel=0.05)


def test_too_few_are_not_measured() -> None:
    assert decide([]).word is Word.NOT_MEASURED
    assert decide([one(0, 0, 3)]).word is Word.NOT_MEASURED
    assert decide([Outcome("", 50)]).word is Word.NOT_MEASURED
    mixed = decide([one(0, 0, 400, name="many"), one(0, 0, 3, name="few")])
    assert mixed.word is Word.NO_LOSS  # what was not measured is not safe
    assert any("few" in note for note in mixed.notes)
    assert not_measured("The selection came without data.").headline == (
        "Verdict: not measured. The selection came without data."
    )


def test_answers_of_another_length_are_not_safe() -> None:
    found = decide([one(0, 0, 400, made=answers(length=1.4))])
    assert found.word is Word.NO_LOSS
    assert "Free answers are 40 % longer than the dense model's." in found.notes


def test_requirements() -> None:
    safe, few, looping = decide([one(0, 0, 400)]), decide([one(0, 0, 10)]), decide([one(0, 0, 99, made=answers(16, 9))])
    assert [v.satisfies("safe") for v in (safe, few, looping)] == [True, False, False]
    assert [v.satisfies("no-loss") for v in (safe, few, looping)] == [True, True, False]
    with pytest.raises(UsageError, match="safe or no-loss"):
        safe.satisfies("perfect")
    with pytest.raises(UsageError, match="a share between 0 and 1"):
        decide([], max_drop=0)


def test_counts_that_do_not_fit_are_refused() -> None:
    for counts in ((10, 5, 6, 0), (10, 5, 0, 6), (10, 11, 0, 0)):
        with pytest.raises(ValueError, match="do not fit"):
            Pairs(*counts)
    assert Pairs.of([1, 1, 0, 0], [1, 0, 1, 0]) == Pairs(4, 2, 1, 1)
    assert Pairs(4, 2, 1, 1) + Pairs(6, 3, 2, 0) == Pairs(10, 5, 3, 1)


@settings(max_examples=60, deadline=None)
@given(measured, st.integers(0, 9), st.booleans())
def test_a_verdict_goes_through_json(outcome, bad, with_calls) -> None:
    calls = {"right": Pairs(9, 8, 3, 1)} if with_calls else None
    agreement = Agreement.of([4, 9], [4, 8])
    made = Outcome("a", outcome.examples, outcome.exact, agreement, 0.01, answers(16, bad), calls)
    found = decide([made, outcome], notes=["seen before"])
    document = json.loads(json.dumps(found.to_document(), allow_nan=False))
    assert Verdict.from_document(document) == found
    assert document["verdict"] == found.word
    assert not re.search(r"-0(\.0)?\b", " ".join(found.lines()))


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0 %"), (-0.0, "0 %"), (1e-7, "< 0.1 %"), (-1e-7, "> -0.1 %"), (0.0123, "1.2 %"), (0.02, "2 %"),
        (0.0999, "10 %"), (0.1074, "11 %"), (0.9876, "99 %"), (0.9968, "99.7 %"), (0.99999, "> 99.9 %"), (1.0, "100 %"),
    ],
)  # fmt: skip
def test_shares_have_the_digits_that_mean_something(share, shown) -> None:
    assert readable_share(share) == shown


@given(st.floats(0, 1))
def test_a_bound_that_is_shown_still_holds(share) -> None:
    shown = share_at_most(share)
    if not shown.startswith(("<", ">")):
        assert float(shown.removesuffix(" %")) / 100 >= share - 1e-9


def test_divergences_have_two_digits() -> None:
    assert [readable_kl(value) for value in (0, 5.2e-15, 0.0123, 1.234, 12.3)] == [
        "< 0.001", "< 0.001", "0.012", "1.2", "12",
    ]  # fmt: skip


def test_answers_part_at_their_first_difference() -> None:
    assert first_divergence((1, 2, 3), (1, 2, 4)) == 2
    assert first_divergence((1, 2, 3), (1, 2)) == 2
    assert first_divergence((), (1,)) == 0


def test_a_class_that_lost_many_of_few_examples_is_named() -> None:
    """Four of twelve can be chance among four intervals, and is not called no loss."""
    good, bad = one(0, 0, 12, name="sums", made=answers()), one(4, 0, 12, name="tables", made=answers())
    found = decide([good, bad])
    assert found.word is Word.LOSS
    assert found.reason.startswith("Class tables may be damaged: exact match falls from 100 % to 67 % over 12 examples")
    assert found.suspects == ("tables",)
    assert "examples of tables" in found.advice
    for fine in (one(1, 0, 9, name="tables", made=answers()), one(2, 0, 20, name="tables", made=answers())):
        assert decide([good, fine]).word is Word.NO_LOSS
        assert decide([good, fine]).suspects == ()
    assert decide([one(4, 0, 12, made=answers())]).word is not Word.SAFE


def test_every_damaged_class_is_a_suspect_worst_first() -> None:
    made = [one(lost, 0, 100, name=name, made=answers()) for name, lost in (("a", 0), ("b", 40), ("c", 70))]
    found = decide([*made, one(0, 0, 100, name="d", made=answers(16, 6))])
    assert found.word is Word.DAMAGED
    assert found.suspects == ("c", "b", "d")


def doubtful(before: float, after: list[float], *, lost: int = 0, count: int = 12, seen: int = 0, name: str = "sums"):
    """A class of which so many answers were lost, whose answers had one probability before and have others now."""
    likely = Likelihood.of([-log(before)] * len(after), [-log(share) for share in after], seen=seen)
    return Outcome(name, count, Pairs(count, count, lost, 0), answers=answers(), likelihood=likely)


def test_a_class_whose_answers_become_less_probable_may_be_damaged() -> None:
    fallen = doubtful(0.9, [0.9] * 9 + [0.7, 0.6, 0.6], seen=5)
    found = decide([one(0, 0, 12, name="words"), fallen])
    assert found.word is Word.LOSS
    assert found.suspects == ("sums",)
    assert found.reason == (
        "Class sums may be damaged: its right answers have a probability of 83 % on average, with the dense model 90 % "
        "(12 examples, 5 of them calibrated with). Exact match over 12 examples, from 100 % to 100 %, does not exclude "
        f"a loss of up to {share_at_most(found.falls[0].fall.high)}."
    )
    document = json.loads(json.dumps(found.to_document()))
    assert document["suspects"] == ["sums"]
    assert {fall["class"]: fall["suspect"] for fall in document["falls"]} == {"sums": True, "words": False}
    assert Verdict.from_document(document) == found


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (doubtful(0.9, [0.89] * 12), "surely less than a tenth"),
        (doubtful(0.9, [0.9] * 11 + [0.3]), "one example of twelve, which can be chance"),
        (doubtful(0.9, [0.95] * 12), "a gain"),
        (doubtful(0.9, [0.9] * 200 + [0.4] * 50, count=250), "exact match excludes it"),
        (doubtful(0.9, [0.6] * 12, name=""), "there are no classes"),
    ],
)
def test_a_class_is_not_suspected_without_a_reason(outcome, why) -> None:
    assert decide([outcome, one(0, 0, 250, name="words")]).suspects == (), why


def test_suspects_beside_the_class_that_decides_are_named_as_well() -> None:
    found = decide([one(40, 0, 64, name="lost"), doubtful(0.9, [0.5, 0.7] * 6), one(50, 0, 64, name="worse")])
    assert found.word is Word.DAMAGED
    assert "in worse falls" in found.reason
    assert [note.partition(" falls")[0] for note in found.notes[:2]] == ["Exact match in lost", found.notes[1]]
    assert found.notes[1].startswith("Class sums may be damaged: ")
    assert set(found.suspects) == {"worse", "lost", "sums"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=2, max_size=20), st.floats(0.1, 3))
def test_the_likelihood_of_answers_is_a_paired_mean(rows, z) -> None:
    dense, pruned = (np.array(column) for column in zip(*rows, strict=True))
    found, differences = Likelihood.of(dense, pruned), np.exp(-dense) - np.exp(-pruned)
    interval = found.fall(z)
    assert interval.value * found.dense == pytest.approx(differences.mean(), abs=1e-12)
    half = z * np.sqrt(np.var(differences, ddof=1) / len(rows)) / found.dense
    assert (interval.high - interval.low) / 2 == pytest.approx(half, abs=1e-12)


def sums(nll: list[float]) -> TeacherForced:
    count, nothing = len(nll), np.zeros(len(nll), dtype=np.int64)
    return TeacherForced(nothing + 1, np.array(nll), np.zeros(count), nothing + 1, nothing == 0)


def test_examples_that_calibration_has_seen_count_for_the_suspicion_alone() -> None:
    """Those of the same set that are left out, and others; of a class that has thirty of its own they do not."""
    dense, pruned = sums([0.1] * 8), sums([0.1, 0.2, 0.3, 0.4] * 2)
    other = Seen(["a", "b"], sums([0.1, 0.1]), sums([0.9, 0.7]), {0, 1})
    for more, seen in ((0, 3), (30, 0)):
        groups = ["a"] * 4 + ["b"] * 4 + ["a"] * more
        theirs, ours = (sums([*found.nll, *[0.1] * more]) for found in (dense, pruned))
        found = outcomes(groups, theirs, ours, answered=range(8 + more), left_out={2, 3, 7}, seen=other)
        assert [outcome.exact.count for outcome in found] == [2 + more, 3]
        likely = found[0].likelihood
        assert (likely.examples, likely.seen) == (2 + more + seen, seen)
        kept = [0.1, 0.2] + [0.1] * more + [0.3, 0.4, 0.9][:seen]
        assert likely.pruned == pytest.approx(np.exp(-np.array(kept)).mean())
    silent = outcomes(["a"] * 4, sums([0.1] * 4), sums([0.2] * 4), answered=range(4), by_answers=True)
    assert silent[0].likelihood is None
