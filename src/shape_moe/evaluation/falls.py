"""How far a model fell behind the dense one on one class of examples, with the ends of its 95 % interval."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import sqrt
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from shape_moe.evaluation.intervals import Estimate, score_interval, wilson_interval

if TYPE_CHECKING:
    from shape_moe.evaluation.generation import Generated

DENSE_REACHES = 0.5
"""Exact match counts where the dense model itself reaches this share."""
EXACT, TOP1, CALLS = "exact match", "top-1 agreement", "right tool calls"


@dataclass(frozen=True)
class Pairs:
    """What two models did with the same examples, counted.

    Attributes:
        count: examples.
        dense: those that the dense model gets right.
        lost: those that only the dense model gets right.
        gained: those that only the pruned model gets right.

    Raises:
        ValueError: for counts that do not fit together.
    """

    count: int
    dense: int
    lost: int
    gained: int

    def __post_init__(self) -> None:
        if not (0 <= self.lost <= self.dense and 0 <= self.gained <= self.count - self.dense):
            raise ValueError(f"counts of paired outcomes do not fit together: {self}")

    @classmethod
    def of(cls, dense: ArrayLike, pruned: ArrayLike) -> Pairs:
        """Count outcomes, bool [examples] of each model."""
        theirs, ours = np.asarray(dense, dtype=bool), np.asarray(pruned, dtype=bool)
        return cls(theirs.size, int(theirs.sum()), int((theirs & ~ours).sum()), int((ours & ~theirs).sum()))

    def __add__(self, other: Pairs) -> Pairs:
        mine, others = asdict(self), asdict(other)
        return Pairs(**{name: mine[name] + others[name] for name in mine})

    @property
    def pruned(self) -> int:
        """Examples that the pruned model gets right."""
        return self.dense - self.lost + self.gained

    @property
    def shares(self) -> tuple[float, float]:
        """What each model gets right, dense first; 0 without examples."""
        return self.dense / max(self.count, 1), self.pruned / max(self.count, 1)

    def fall(self, z: float) -> Estimate:
        """``(lost - gained) / count`` with its score interval (:func:`score_interval`), ``z`` deviations wide."""
        return Estimate((self.lost - self.gained) / self.count, *score_interval(self.lost, self.gained, self.count, z))


@dataclass(frozen=True)
class Agreement:
    """At how many tokens a model's most likely next token is another one than the dense model's.

    Attributes:
        examples: examples, those of uneven length counted for less: ``(sum t)^2 / sum t^2`` over their tokens ``t``.
        share: differing tokens of all.
        error: standard error of that share over examples; 1, the most there can be, for a single one.
    """

    examples: float
    share: float
    error: float

    @classmethod
    def of(cls, tokens: ArrayLike, agree: ArrayLike) -> Agreement | None:
        """Sum up scored tokens and agreeing ones, int [examples] each; None where no token is scored."""
        scored = np.asarray(tokens, dtype=np.float64)
        differing = (scored - np.asarray(agree, dtype=np.float64))[scored > 0]
        scored = scored[scored > 0]
        if not scored.size:
            return None
        share = float(differing.sum() / scored.sum())
        spread = float(((differing - share * scored) ** 2).sum())
        count = scored.size
        error = sqrt(spread * count / (count - 1)) / float(scored.sum()) if count > 1 else 1.0
        return cls(float(scored.sum() ** 2 / (scored**2).sum()), share, error)

    def fall(self, z: float) -> Estimate:
        """The share of differing tokens, and Wilson's interval of it as if every example were one observation.

        Tokens of one answer stand and fall together, so that thousands of them say no more than their examples. The
        lower end is no higher than the share less ``z`` standard errors: what one or two examples did proves nothing.
        """
        low, high = wilson_interval(self.share, self.examples, z)
        return Estimate(self.share, max(0.0, min(low, self.share - z * self.error)), high)


@dataclass(frozen=True)
class Likelihood:
    """How probable both models find the right answers, each as a whole.

    Exact match of ten answers moves in steps of 10 %; their probabilities show before that what gets worse.

    Attributes:
        examples: answers.
        seen: those of them that calibration has seen. The model keeps what they need, so that others would rather show
            a larger fall.
        dense: mean over answers of ``exp(-sum of the negative log-likelihoods of its tokens)`` by the dense model.
        pruned: the same by the pruned model.
        error: standard error of ``dense - pruned`` over answers, paired.
    """

    examples: int
    seen: int
    dense: float
    pruned: float
    error: float

    @classmethod
    def of(cls, dense: ArrayLike, pruned: ArrayLike, *, seen: int = 0) -> Likelihood | None:
        """From summed negative log-likelihoods in nats, float [examples] each; None for fewer than two answers."""
        theirs, ours = (np.exp(-np.asarray(nll, dtype=np.float64)) for nll in (dense, pruned))
        if theirs.size < 2:
            return None
        error = float((theirs - ours).std(ddof=1)) / sqrt(theirs.size)
        return cls(theirs.size, seen, float(theirs.mean()), float(ours.mean()), error)

    def fall(self, z: float) -> Estimate:
        """The fall as a share of what the dense model reaches, and an interval ``z`` standard errors wide."""
        fall, error = (number / max(self.dense, 1e-300) for number in (self.dense - self.pruned, self.error))
        return Estimate(fall, fall - z * error, fall + z * error)


@dataclass(frozen=True)
class FreeAnswers:
    """Answers that both models wrote freely to the same prompts.

    Attributes:
        healthy: which of them end by themselves and not in a loop.
        loops: how many end in a loop, dense first.
        no_ends: how many do not end, dense first.
        tokens: tokens of all answers together, dense first.
        divergences: tokens until the first one that is not the dense model's, of each answer that differs.
    """

    healthy: Pairs
    loops: tuple[int, int]
    no_ends: tuple[int, int]
    tokens: tuple[int, int]
    divergences: tuple[int, ...]

    @classmethod
    def of(cls, dense: Generated, made: Generated, rows: Sequence[int] | None = None) -> FreeAnswers | None:
        """Compare answers to the same prompts.

        Args:
            dense: the dense model's.
            made: the pruned model's.
            rows: which of the examples count, by position in their set; None for all.
        """
        counted = set(made.positions if rows is None else rows)
        at = [i for i, position in enumerate(made.positions) if position in counted]
        if not at:
            return None
        pairs = [(dense.answers[i], made.answers[i]) for i in at]
        return cls(
            Pairs.of((dense.ended & ~dense.looped)[at], (made.ended & ~made.looped)[at]),
            (int(dense.looped[at].sum()), int(made.looped[at].sum())),
            (int((~dense.ended[at]).sum()), int((~made.ended[at]).sum())),
            (sum(len(theirs) for theirs, _ in pairs), sum(len(ours) for _, ours in pairs)),
            tuple(first_divergence(theirs, ours) for theirs, ours in pairs if theirs != ours),
        )

    def __add__(self, other: FreeAnswers) -> FreeAnswers:
        def both(mine: tuple[int, int], others: tuple[int, int]) -> tuple[int, int]:
            return mine[0] + others[0], mine[1] + others[1]

        return FreeAnswers(
            self.healthy + other.healthy,
            both(self.loops, other.loops),
            both(self.no_ends, other.no_ends),
            both(self.tokens, other.tokens),
            self.divergences + other.divergences,
        )

    @property
    def count(self) -> int:
        """How many answers each model wrote."""
        return self.healthy.count

    @property
    def excess(self) -> int:
        """How many more answers of the pruned model than of the dense one loop or do not end."""
        return self.healthy.lost - self.healthy.gained

    @property
    def lengthening(self) -> float:
        """Relative change of the mean length."""
        before, after = self.tokens
        return (after - before) / max(before, self.count, 1)

    @property
    def median_divergence(self) -> float | None:
        """Median of :attr:`divergences`, None where all answers are the dense model's."""
        return float(median(self.divergences)) if self.divergences else None


def first_divergence(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many tokens two answers share before they part."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Outcome:
    """What was measured on one class of examples.

    Attributes:
        name: the class, empty where there are none.
        examples: how many examples.
        exact: exact match of the examples that have an answer to match, None where there is none.
        agreement: agreement with the dense model's most likely tokens, None where no token was scored.
        kl: KL divergence from the dense model, mean nats per token; None where it was not measured.
        answers: free answers, None where there are none.
        calls: tool calls by aspect (see :func:`shape_moe.evaluation.tool_calls.compare_calls`), None where no
            example has tools.
        kl_is_bound: whether the KL divergence is known to be that large at least, and may be larger.
        likelihood: how probable the right answers are, None where that is not known.
    """

    name: str
    examples: int
    exact: Pairs | None = None
    agreement: Agreement | None = None
    kl: float | None = None
    answers: FreeAnswers | None = None
    calls: Mapping[str, Pairs] | None = None
    kl_is_bound: bool = False
    likelihood: Likelihood | None = None

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Outcome:
        """What :meth:`to_document` described."""
        given = {
            "kl_is_bound": False,
            "likelihood": None,
            **{f.name: document[f.name] for f in fields(cls) if f.name in document},
        }
        exact, agreement, answers, calls = (given[name] for name in ("exact", "agreement", "answers", "calls"))
        return cls(
            given["name"],
            given["examples"],
            None if exact is None else Pairs(**exact),
            None if agreement is None else Agreement(**agreement),
            given["kl"],
            None if answers is None else _answers(answers),
            None if calls is None else {name: Pairs(**pairs) for name, pairs in calls.items()},
            bool(given["kl_is_bound"]),
            None if given["likelihood"] is None else Likelihood(**given["likelihood"]),
        )

    def falls(self, z: float) -> list[Fall]:
        """The falls that decide: of answers, and of tool calls where there are any."""
        found = []
        if self.exact is not None and self.exact.count and self.exact.shares[0] >= DENSE_REACHES:
            fall = self.exact.fall(z)
            shares, likely = self.exact.shares, self.likelihood
            found.append(Fall(self.name, EXACT, self.exact.count, shares, fall, self.kl, self.kl_is_bound, likely))
        elif self.agreement is not None:
            shares = (1.0, 1 - self.agreement.share)
            fall = self.agreement.fall(z)
            found.append(Fall(self.name, TOP1, self.examples, shares, fall, self.kl, self.kl_is_bound))
        right = (self.calls or {}).get("right")
        if right is not None and right.count:
            found.append(Fall(self.name, CALLS, right.count, right.shares, right.fall(z)))
        return found


def _answers(document: Mapping[str, Any]) -> FreeAnswers:
    def both(name: str) -> tuple[int, int]:
        dense, pruned = document[name]
        return int(dense), int(pruned)

    healthy = Pairs(**document["healthy"])
    return FreeAnswers(healthy, both("loops"), both("no_ends"), both("tokens"), tuple(document["divergences"]))


@dataclass(frozen=True)
class Fall:
    """By how much one figure of one class fell.

    Attributes:
        name: the class, empty where there are none.
        figure: ``exact match``, ``top-1 agreement`` or ``right tool calls``.
        examples: how many examples it was measured on.
        shares: the figure itself, dense first.
        fall: its fall as a share, positive for a loss.
        kl: KL divergence beside it.
        kl_is_bound: whether it is that large at least, and may be larger.
        likelihood: how probable the answers are that exact match counts, None where that is not known.
    """

    name: str
    figure: str
    examples: int
    shares: tuple[float, float]
    fall: Estimate
    kl: float | None = None
    kl_is_bound: bool = False
    likelihood: Likelihood | None = None
