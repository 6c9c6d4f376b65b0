"""The verdict on a pruned model: one of five words, by a rule that docs/verdict.md states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import reduce
from operator import add
from statistics import NormalDist
from typing import Any

from shape_moe.errors import UsageError
from shape_moe.evaluation.falls import CALLS, Fall, FreeAnswers, Outcome
from shape_moe.evaluation.intervals import examples_for, quantile
from shape_moe.evaluation.measures import HEALTH_LIMIT, LENGTH_LIMIT
from shape_moe.evaluation.verdict_words import (
    broken,
    class_first,
    describe_answers,
    describe_calls,
    describe_fall,
    doubted,
    fallen,
    in_class,
    of_class,
    silent,
)
from shape_moe.text import one_line
from shape_moe.units import capitalised, counted, readable_share, share_at_most

MAX_DROP = 0.02
"""The fall that a model may have and still be called safe, unless told otherwise."""
DAMAGE = 0.1
"""A model whose fall is surely above this is damaged."""
FEWEST_LOST = 2
"""A class may be damaged when it lost so many examples, and more than :data:`DAMAGE` of them."""
DOUBT = NormalDist().inv_cdf(0.9)
"""A class may be damaged when an interval of so many standard errors of its answers' probability excludes that
nothing fell, and includes a fall of :data:`DAMAGE`: the fall is larger, or smaller, once in ten times each."""
FEWEST = 4
"""With fewer examples a class is not measured."""
FEWEST_SAFE = 30
"""With fewer examples no class is safe, whatever fall is allowed: the intervals are not good enough there."""
FORMAT_VERSION = 1


class Word(StrEnum):
    """What a verdict says."""

    SAFE = "safe"
    NO_LOSS = "no loss seen"
    LOSS = "measurable loss"
    DAMAGED = "damaged"
    NOT_MEASURED = "not measured"


REQUIREMENTS: dict[str, frozenset[Word]] = {
    "safe": frozenset({Word.SAFE}),
    "no-loss": frozenset({Word.SAFE, Word.NO_LOSS}),
}
"""What a job may be told to require of its model, and the verdicts that satisfy it."""


@dataclass(frozen=True)
class Verdict:
    """What pruning did to a model, in a word, with the figures behind it.

    Attributes:
        word: the verdict.
        reason: why, in one sentence.
        advice: what to do next, in one sentence; empty where there is nothing to do.
        max_drop: the fall that *safe* allows, as a share.
        comparisons: how many falls the intervals hold for together.
        outcomes: what was measured, by class.
        notes: what else a reader should know.
    """

    word: Word
    reason: str
    advice: str = ""
    max_drop: float = MAX_DROP
    comparisons: int = 1
    outcomes: tuple[Outcome, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def falls(self) -> list[Fall]:
        """The falls that were measured on enough examples, worst first."""
        found = _falls(self.outcomes, quantile(self.comparisons))
        return sorted(found, key=lambda fall: (-fall.fall.value, -fall.fall.high, fall.name, fall.figure))

    @property
    def suspects(self) -> tuple[str, ...]:
        """The classes that are damaged, or seem to be by what was counted, worst first."""
        found = [fall.name for fall in self.falls if seems_damaged(fall)]
        found += [entry.name for entry in self.outcomes if entry.answers is not None and _is_broken(entry.answers)]
        return tuple(name for name in dict.fromkeys(found) if name)

    @property
    def answers(self) -> FreeAnswers | None:
        """The free answers of all classes together."""
        made = [outcome.answers for outcome in self.outcomes if outcome.answers is not None]
        return reduce(add, made) if made else None

    def satisfies(self, requirement: str) -> bool:
        """Whether the verdict is good enough for ``safe`` or ``no-loss``.

        Raises:
            UsageError: for another requirement.
        """
        check_requirement(requirement)
        return self.word in REQUIREMENTS[requirement]

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        return f"Verdict: {self.word}. {self.reason}"

    def lines(self) -> list[str]:
        """The verdict as people read it: headline, classes worst first, answers, what to do next."""
        found = [self.headline, *(describe_fall(fall) for fall in self.falls)]
        found += [line for outcome in self.outcomes if (line := describe_calls(outcome))]
        if self.answers is not None:
            found.append(describe_answers(self.answers))
        found += self.notes
        return [one_line(line) for line in (*found, *([f"Next: {self.advice}"] if self.advice else []))]

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "verdict": str(self.word),
            "reason": self.reason,
            "advice": self.advice,
            "max_drop": self.max_drop,
            "comparisons": self.comparisons,
            "suspects": list(self.suspects),
            "falls": [
                {
                    "class": fall.name or None,
                    "figure": fall.figure,
                    "examples": fall.examples,
                    "dense": fall.shares[0],
                    "pruned": fall.shares[1],
                    "fall": fall.fall.to_document(),
                    "kl": fall.kl,
                    "kl_is_bound": fall.kl_is_bound,
                    "suspect": bool(fall.name) and seems_damaged(fall),
                }
                for fall in self.falls
            ],
            "outcomes": [outcome.to_document() for outcome in self.outcomes],
            "notes": list(self.notes),
            "lines": self.lines(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Verdict:
        """The verdict that :meth:`to_document` described."""
        return cls(
            Word(document["verdict"]),
            str(document["reason"]),
            str(document["advice"]),
            float(document["max_drop"]),
            int(document["comparisons"]),
            tuple(Outcome.from_document(outcome) for outcome in document["outcomes"]),
            tuple(document["notes"]),
        )


def not_measured(reason: str, advice: str = "", *, max_drop: float = MAX_DROP) -> Verdict:
    """The verdict where there was nothing to judge by."""
    return Verdict(Word.NOT_MEASURED, reason, advice, max_drop)


def check_requirement(requirement: str) -> None:
    """Whether a verdict can be required.

    Raises:
        UsageError: for another word than ``safe`` and ``no-loss``.
    """
    if requirement not in REQUIREMENTS:
        raise UsageError(f"--require takes {' or '.join(REQUIREMENTS)}, not {requirement!r}.")


def check_max_drop(max_drop: float) -> None:
    """Whether a fall can be allowed.

    Raises:
        UsageError: for one outside (0, 1).
    """
    if not 0 < max_drop < 1:
        raise UsageError(f"--max-drop must be a share between 0 and 1, such as 2% or 0.02, not {max_drop:g}.")


def decide(outcomes: Sequence[Outcome], *, max_drop: float = MAX_DROP, notes: Sequence[str] = ()) -> Verdict:
    """The verdict over what was measured; see docs/verdict.md.

    Args:
        outcomes: by class of examples; one without a name where there are no classes.
        max_drop: the fall, as a share, that *safe* allows.
        notes: what else a reader should know.

    Raises:
        UsageError: for a ``max_drop`` outside (0, 1).
    """
    check_max_drop(max_drop)
    comparisons = max(1, len(_falls(outcomes, quantile())))
    judged = _Judged(Verdict(Word.NOT_MEASURED, "", "", max_drop, comparisons, tuple(outcomes)))
    for rule in (judged.unmeasured, judged.damaged, judged.safe, judged.loss, judged.suspected, judged.no_loss):
        found = rule()
        if found is not None:
            word, reason, advice = found
            break
    return Verdict(word, reason, advice, max_drop, comparisons, tuple(outcomes), (*judged.notes(word), *notes))


def _falls(outcomes: Sequence[Outcome], z: float) -> list[Fall]:
    return [fall for outcome in outcomes for fall in outcome.falls(z) if fall.examples >= FEWEST]


_Found = tuple[Word, str, str] | None


@dataclass
class _Judged:
    """The rules in the order in which they are tried."""

    verdict: Verdict
    falls: list[Fall] = field(init=False)
    unhealthy: list[tuple[str, FreeAnswers]] = field(init=False)
    named: str = ""

    def __post_init__(self) -> None:
        self.falls = self.verdict.falls
        made = [(outcome.name, outcome.answers) for outcome in self.verdict.outcomes if outcome.answers is not None]
        if len(made) > 1 and self.verdict.answers is not None:
            made.append(("", self.verdict.answers))
        found = [(name, answers) for name, answers in made if answers.excess > HEALTH_LIMIT * answers.count]
        self.unhealthy = sorted(found, key=lambda entry: (-entry[1].excess / entry[1].count, entry[0]))

    def unmeasured(self) -> _Found:
        if self.falls or self.unhealthy:
            return None
        count = sum(outcome.examples for outcome in self.verdict.outcomes)
        reason = f"There are {count} examples to judge by, and a class needs {FEWEST} at least."
        if any(outcome.examples >= FEWEST for outcome in self.verdict.outcomes):
            reason = "The examples hold no token that could be scored and no answer to compare."
        return Word.NOT_MEASURED, reason, f"Judge by {counted(self._needed(), 'example')} or more that have answers."

    def damaged(self) -> _Found:
        advice = "keep more experts, or calibrate with more examples"
        for name, answers in self.unhealthy:
            if _is_broken(answers):
                self.named = name
                return Word.DAMAGED, f"{class_first(name)}{broken(answers)}.", f"{capitalised(advice)}{of_class(name)}."
        for fall in self.falls:
            if fall.figure != CALLS and fall.fall.low > DAMAGE:
                self.named = fall.name
                return Word.DAMAGED, fallen(fall), f"{capitalised(advice)}{of_class(fall.name)}."
        return None

    def safe(self) -> _Found:
        classes, answers = self.verdict.outcomes, self.verdict.answers
        enough = all(fall.examples >= FEWEST_SAFE for fall in self.falls)
        every = {fall.name for fall in self.falls} == {outcome.name for outcome in classes}
        within = all(fall.fall.high <= self.verdict.max_drop for fall in self.falls)
        if not (self.falls and enough and every and within and answers and not self.unhealthy and not self._longer()):
            return None
        worst = max(self.falls, key=lambda fall: fall.fall.high)
        reason = f"{capitalised(worst.figure)}{in_class(worst.name)} falls by {share_at_most(worst.fall.high)} at most"
        return Word.SAFE, f"{reason}, and {counted(answers.count, 'free answer')} are as healthy as before.", ""

    def loss(self) -> _Found:
        advice = "Keep more experts, or calibrate with more examples"
        for fall in sorted(self.falls, key=lambda fall: fall.figure != CALLS):
            if fall.fall.low > 0:
                self.named = fall.name
                reason = silent(self.verdict.outcomes, fall) if fall.figure == CALLS else ""
                return Word.LOSS, reason + fallen(fall), f"{advice}{of_class(fall.name)}."
        for name, answers in self.unhealthy:
            self.named = name
            return Word.LOSS, f"{class_first(name)}{broken(answers)}.", f"{advice}{of_class(name)}."
        return None

    def suspected(self) -> _Found:
        for fall in self.falls:
            if fall.name and seems_damaged(fall):
                self.named = fall.name
                advice = f"Keep more experts, or calibrate with more examples of {fall.name}; judge by "
                return Word.LOSS, _doubted(fall), f"{advice}{self._needed():,} examples of each class to know."
        return None

    def no_loss(self) -> _Found:
        widest = max(self.falls, key=lambda fall: (fall.fall.high, fall.name))
        reason = f"{counted(widest.examples, 'example')}{of_class(widest.name)}: "
        if widest.fall.value > 0:
            reason += f"{readable_share(widest.fall.value)} were lost, which can be chance, and "
        reason += "a loss of up to "
        reason += f"{share_at_most(widest.fall.high)} is not excluded"
        needed, allowed = self._needed(), readable_share(self.verdict.max_drop)
        if widest.examples < needed:
            several = " for each class" if self.verdict.comparisons > 1 else ""
            advice = f"Judge by {needed:,} examples{several}"
            return Word.NO_LOSS, f"{reason}; {needed:,} without a loss would show {allowed}.", f"{advice}."
        return Word.NO_LOSS, f"{reason}.", "Judge by more examples."

    def _others(self) -> list[str]:
        """The classes that are damaged or may be, beside the one that decided."""
        found = {}
        for fall in self.falls:
            if fall.name and seems_damaged(fall):
                found[fall.name] = fallen(fall) if fall.fall.low > DAMAGE else _doubted(fall)
        for name, answers in self.unhealthy:
            if name and _is_broken(answers):
                found.setdefault(name, f"{class_first(name)}{broken(answers)}.")
        return [text for name, text in found.items() if name != self.named]

    def _needed(self) -> int:
        return max(FEWEST_SAFE, examples_for(self.verdict.max_drop, self.verdict.comparisons))

    def _longer(self) -> bool:
        answers = self.verdict.answers
        return answers is not None and abs(answers.lengthening) > LENGTH_LIMIT

    def notes(self, word: Word) -> list[str]:
        """What the word leaves out."""
        found = self._others()
        if self.verdict.answers is None and word in {Word.NO_LOSS, Word.LOSS}:
            found.append("No free answers were made, and likelihood alone never makes a model safe.")
        if self._longer():
            answers = self.verdict.answers
            assert answers is not None
            more = "longer" if answers.lengthening > 0 else "shorter"
            found.append(f"Free answers are {readable_share(abs(answers.lengthening))} {more} than the dense model's.")
        few = [outcome for outcome in self.verdict.outcomes if outcome.examples < FEWEST]
        if few and word is not Word.NOT_MEASURED:
            names = ", ".join(outcome.name or "the examples" for outcome in few)
            found.append(f"Not measured, with fewer than {FEWEST} examples each: {names}.")
        return found


def seems_damaged(fall: Fall) -> bool:
    """Whether more than 10 points were lost, or may have been by what few examples show.

    May have been: two examples at least were lost, and more than 10 % of them, or answers became less probable, and
    neither that nor exact match excludes 10 %.
    """
    if fall.figure == CALLS:
        return False
    few = fall.examples < FEWEST_SAFE and round(fall.fall.value * fall.examples, 6) >= FEWEST_LOST
    if fall.fall.low > DAMAGE or (few and fall.fall.value > DAMAGE):
        return True
    return _is_less_probable(fall)


def _doubted(fall: Fall) -> str:
    return doubted(fall, less_probable=_is_less_probable(fall))


def _is_less_probable(fall: Fall) -> bool:
    if fall.likelihood is None or fall.fall.high <= DAMAGE:
        return False
    less = fall.likelihood.fall(DOUBT)
    return less.low > 0 and less.high > DAMAGE


def _is_broken(answers: FreeAnswers) -> bool:
    """Whether so many more answers than the dense model's loop or do not end that the model is damaged."""
    return answers.excess >= 2 and answers.excess > DAMAGE * answers.count
