"""The verdict on a pruned model: one of five words, by a rule that docs/verdict.md states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import reduce
from operator import add
from typing import Any

from shape_moe.errors import UsageError
from shape_moe.evaluation.falls import CALLS, Fall, FreeAnswers, Outcome
from shape_moe.evaluation.intervals import examples_for, quantile
from shape_moe.evaluation.measures import HEALTH_LIMIT, LENGTH_LIMIT
from shape_moe.text import one_line
from shape_moe.units import capitalised, counted, kl_at_least, readable_kl, readable_share, share_at_most

MAX_DROP = 0.02
"""The fall that a model may have and still be called safe, unless told otherwise."""
DAMAGE = 0.1
"""A model whose fall is surely above this is damaged."""
FEWEST_LOST = 2
"""A class may be damaged when it lost so many examples, and more than :data:`DAMAGE` of them."""
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
        found = [fall.name for fall in self.falls if _seems_damaged(fall)]
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
                return Word.DAMAGED, f"{_of(name)}{_broken(answers)}.", f"{capitalised(advice)}{_such(name)}."
        for fall in self.falls:
            if fall.figure != CALLS and fall.fall.low > DAMAGE:
                return Word.DAMAGED, _fallen(fall), f"{capitalised(advice)}{_such(fall.name)}."
        return None

    def safe(self) -> _Found:
        classes, answers = self.verdict.outcomes, self.verdict.answers
        enough = all(fall.examples >= FEWEST_SAFE for fall in self.falls)
        every = {fall.name for fall in self.falls} == {outcome.name for outcome in classes}
        within = all(fall.fall.high <= self.verdict.max_drop for fall in self.falls)
        if not (self.falls and enough and every and within and answers and not self.unhealthy and not self._longer()):
            return None
        worst = max(self.falls, key=lambda fall: fall.fall.high)
        reason = f"{capitalised(worst.figure)}{_in(worst.name)} falls by {share_at_most(worst.fall.high)} at most"
        return Word.SAFE, f"{reason}, and {counted(answers.count, 'free answer')} are as healthy as before.", ""

    def loss(self) -> _Found:
        advice = "Keep more experts, or calibrate with more examples"
        for fall in sorted(self.falls, key=lambda fall: fall.figure != CALLS):
            if fall.fall.low > 0:
                reason = _silent(self.verdict.outcomes, fall) if fall.figure == CALLS else ""
                return Word.LOSS, reason + _fallen(fall), f"{advice}{_such(fall.name)}."
        for name, answers in self.unhealthy:
            return Word.LOSS, f"{_of(name)}{_broken(answers)}.", f"{advice}{_such(name)}."
        return None

    def suspected(self) -> _Found:
        for fall in self.falls:
            if fall.name and _seems_damaged(fall):
                dense, pruned = (readable_share(share) for share in fall.shares)
                needed = f"judge by {self._needed():,} examples of each class to know"
                return (
                    Word.LOSS,
                    f"Class {fall.name} may be damaged: {fall.figure} falls from {dense} to {pruned} over "
                    f"{counted(fall.examples, 'example')}, which are too few to rule out chance; a loss of up to "
                    f"{share_at_most(fall.fall.high)} is not excluded.",
                    f"Keep more experts, or calibrate with more examples of {fall.name}; {needed}.",
                )
        return None

    def no_loss(self) -> _Found:
        widest = max(self.falls, key=lambda fall: (fall.fall.high, fall.name))
        reason = f"{counted(widest.examples, 'example')}{_such(widest.name)}: "
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

    def _needed(self) -> int:
        return max(FEWEST_SAFE, examples_for(self.verdict.max_drop, self.verdict.comparisons))

    def _longer(self) -> bool:
        answers = self.verdict.answers
        return answers is not None and abs(answers.lengthening) > LENGTH_LIMIT

    def notes(self, word: Word) -> list[str]:
        """What the word leaves out."""
        found = []
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


def describe_fall(fall: Fall) -> str:
    """One class in a line."""
    dense, pruned = (readable_share(share) for share in fall.shares)
    name = f"{fall.name}: " if fall.name else ""
    text = f"{name}{fall.figure} {dense} -> {pruned}"
    if fall.fall.value < 0:
        text += f", a gain of {_points(-fall.fall.value)}"
    elif fall.fall.value > 0:
        text += f", a fall of {_points(fall.fall.value)}"
    else:
        text += ", no fall"
    high = share_at_most(max(fall.fall.high, 0.0)).removesuffix(" %")
    text += f" (at least {readable_share(fall.fall.low).removesuffix(' %')}, " if fall.fall.low > 0 else " ("
    shown = kl_at_least if fall.kl_is_bound else readable_kl
    kl = "" if fall.kl is None else f", KL {shown(fall.kl)}"
    return f"{text}at most {high}){kl}, {counted(fall.examples, 'example')}"


def describe_calls(outcome: Outcome) -> str:
    """What became of the tool calls of a class, dense beside pruned; empty where there are none."""
    words = {"decision": "right decision to call or not", "name": "right function", "arguments": "equal arguments"}
    words["valid"] = "arguments valid by the schema"
    calls = outcome.calls or {}
    parts = [
        f"{text} {calls[key].dense} -> {calls[key].pruned} of {calls[key].count}"
        for key, text in words.items()
        if key in calls and calls[key].count
    ]
    name = f"{outcome.name}: " if outcome.name else ""
    return f"{name}tool calls, dense -> pruned: {'; '.join(parts)}" if parts else ""


def describe_answers(answers: FreeAnswers) -> str:
    """Free answers in a line."""
    (loops_before, loops), (endless_before, endless) = answers.loops, answers.no_ends
    text = f"{counted(answers.count, 'free answer')}: {loops} {_verb(loops, 'end')} in a loop (dense {loops_before}), "
    text += f"{endless} {'does' if endless == 1 else 'do'} not end (dense {endless_before}); "
    if answers.median_divergence is None:
        return f"{text}all are the dense model's, token for token"
    same, after = answers.count - len(answers.divergences), counted(round(answers.median_divergence), "token")
    return f"{text}{same} {_are(same)} the dense model's, the others part after {after}"


def _fallen(fall: Fall) -> str:
    """The fall that decided."""
    dense, pruned = (readable_share(share) for share in fall.shares)
    verb = "fall" if fall.figure == CALLS else "falls"
    text = f"{capitalised(fall.figure)}{_in(fall.name)} {verb} from {dense} to {pruned} over "
    text += f"{counted(fall.examples, 'example')}: a loss of {readable_share(fall.fall.low)} at least, "
    return f"{text}{share_at_most(fall.fall.high)} at most."


def _silent(outcomes: Sequence[Outcome], fall: Fall) -> str:
    """That a model makes no calls any more, where that is so."""
    made = next((outcome.calls or {} for outcome in outcomes if outcome.name == fall.name), {}).get("made")
    return "It calls no tools any more. " if made is not None and made.dense > 0 == made.pruned else ""


def _seems_damaged(fall: Fall) -> bool:
    """Whether more than 10 points were lost, surely or of examples too few to be sure: two of them at least."""
    if fall.figure == CALLS:
        return False
    few = fall.examples < FEWEST_SAFE and round(fall.fall.value * fall.examples, 6) >= FEWEST_LOST
    return fall.fall.low > DAMAGE or (few and fall.fall.value > DAMAGE)


def _is_broken(answers: FreeAnswers) -> bool:
    """Whether so many more answers than the dense model's loop or do not end that the model is damaged."""
    return answers.excess >= 2 and answers.excess > DAMAGE * answers.count


def _broken(answers: FreeAnswers) -> str:
    """What is wrong with free answers."""
    kinds = ((answers.loops, ("ends in a loop", "end in a loop")), (answers.no_ends, ("does not end", "do not end")))
    parts = [
        f"{after} of {answers.count} free answers {what[after > 1]} ({before} of the dense model's)"
        for (before, after), what in kinds
        if after > before
    ]
    return " and ".join(parts) or f"{answers.healthy.lost} of {answers.count} free answers loop or do not end"


def _verb(count: int, verb: str) -> str:
    return f"{verb}s" if count == 1 else verb


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _points(share: float) -> str:
    """A difference of shares in percentage points."""
    shown = readable_share(share).removesuffix(" %")
    return f"{shown} {'point' if shown == '1' else 'points'}"


def _of(name: str) -> str:
    return f"{name}: " if name else ""


def _in(name: str) -> str:
    return f" in {name}" if name else ""


def _such(name: str) -> str:
    return f" of {name}" if name else ""
