"""Served models beside the dense one, question by question: what they answer, and where and how far they part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.calibration.records import Record
from shape_moe.evaluation.falls import first_divergence
from shape_moe.evaluation.forgotten import Answered, Forgotten, by_group
from shape_moe.evaluation.generation import Generated, answer_proper, ends_in_loop
from shape_moe.evaluation.served_answers import ServedAnswer, ServedModel, partial_kl
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.tool_call_formats import Calls, ToolCall, calls_of_message
from shape_moe.units import readable_share

_SPARE = 1.25
_LOOP_TOKENS = 16
_SHORT = 1024
OPEN_ANSWER_TOKENS = 512
"""The longest answer where the data does not say how long one is."""


@dataclass(frozen=True)
class Asked:
    """What servers are asked, and what the data says to it.

    Attributes:
        record: the prompt.
        reference: the data's answer, None where it has none.
    """

    record: Record
    reference: str | None = None

    @classmethod
    def of(cls, record: Record) -> Asked | None:
        """The last turn of a record as a question; None for a text without prompt and response."""
        if record.text is not None:
            return None
        if record.messages is None:
            return cls(Record(record.index, record.where, prompt=record.prompt, group=record.group), record.response)
        if record.lacks_response:
            return cls(record)
        *before, last = record.messages
        if not before:
            return None
        cut = Record(record.index, record.where, messages=tuple(before), group=record.group, tools=record.tools)
        return cls(cut, None if calls_of_message(last) else str(last.get("content") or ""))


@dataclass(frozen=True)
class Compared:
    """One answer beside the dense model's to the same prompt.

    Attributes:
        text: what it says.
        calls: the tool calls that it makes.
        tokens: its tokens as text.
        ended: whether the model ended it itself.
        steps: steps at which both models had written the same so far: all that can be compared.
        agreed: those of them at which both went on with the same token.
        measured: those at which both servers named their most likely tokens.
        kl: summed KL divergence from the dense model at the measured ones, nats; no more than the true one.
        unnamed: summed probability that the dense model gives to tokens it does not name there.
    """

    text: str
    calls: Calls
    tokens: tuple[str, ...]
    ended: bool
    steps: int
    agreed: int
    measured: int
    kl: float
    unnamed: float

    @classmethod
    def of(cls, answer: ServedAnswer, dense: ServedAnswer) -> Compared:
        """Compare an answer with the dense model's."""
        same = first_divergence(dense.tokens, answer.tokens)
        # an answer that was cut off says nothing of the step at which it was
        steps = min(same + 1, len(dense.tokens), len(answer.tokens))
        pairs = [
            partial_kl(theirs, ours) for theirs, ours in zip(dense.named[:steps], answer.named[:steps], strict=False)
        ]
        return cls(
            answer.text,
            answer.calls,
            answer.tokens,
            answer.ended,
            steps,
            min(same, steps),
            len(pairs),
            sum(kl for kl, _ in pairs),
            sum(unnamed for _, unnamed in pairs),
        )

    @property
    def said(self) -> str:
        """The text behind thoughts."""
        return self.text.rpartition("</think>")[2].strip()

    def to_item(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_item(cls, item: Mapping[str, Any]) -> Compared:
        """What :meth:`to_item` gave."""
        calls = tuple(ToolCall(**call) for call in item["calls"])
        return cls(**{**item, "calls": calls, "tokens": tuple(item["tokens"])})


def ask_all(models: Sequence[ServedModel], record: Record, max_tokens: int) -> list[Compared]:
    """Ask all models the same, the dense one first, and compare each with that."""
    answers = [model.ask(record, max_tokens) for model in models]
    return [Compared.of(answer, answers[0]) for answer in answers]


def answer_room(asked: Sequence[Asked]) -> int:
    """The most tokens of an answer: a quarter more than the longest one of the data, whose tokens nobody has counted.

    A token has a byte at least; in long answers two.
    """
    sizes = [len(one.reference.encode()) for one in asked if one.reference is not None]
    if not sizes:
        return OPEN_ANSWER_TOKENS
    longest = max(sizes)
    return int(_SPARE * min(longest, max(_SHORT, longest // 2))) + _LOOP_TOKENS


def right_answers(
    asked: Sequence[Asked], answers: Sequence[Compared], dense: Sequence[Compared], pattern: str | None
) -> NDArray[np.bool_]:
    """Which answers are the data's, or the dense model's where the data has none; bool [examples]."""
    found = []
    for one, ours, theirs in zip(asked, answers, dense, strict=True):
        wanted = answer_proper(theirs.said if one.reference is None else one.reference, pattern)
        same = wanted is not None and answer_proper(ours.said, pattern) == wanted
        found.append(same and (pattern is not None or ours.ended))
    return np.array(found, dtype=bool)


def sums_of(
    asked: Sequence[Asked], answers: Sequence[Compared], dense: Sequence[Compared], pattern: str | None = None
) -> TeacherForced:
    """What was compared, as sums by example.

    KL divergences are lower bounds, over :func:`measured_tokens`; likelihoods of the data's answers are not known
    (``nll`` is 0).
    """
    steps = np.array([answer.steps for answer in answers], dtype=np.int64)
    kl = np.array([answer.kl for answer in answers], dtype=np.float64)
    agreed = np.array([answer.agreed for answer in answers], dtype=np.int64)
    return TeacherForced(steps, np.zeros(len(steps)), kl, agreed, right_answers(asked, answers, dense, pattern))


def measured_tokens(answers: Sequence[Compared]) -> NDArray[np.int64]:
    """Tokens of each answer at which both servers named likely ones."""
    return np.array([answer.measured for answer in answers], dtype=np.int64)


def free_answers(answers: Sequence[Compared], exact: Any, limit: int, ids: dict[str, int]) -> Generated:
    """Answers as the judgement takes them; ``ids`` numbers tokens, and grows."""
    numbered = tuple(tuple(ids.setdefault(token, len(ids)) for token in answer.tokens) for answer in answers)
    return Generated(
        positions=tuple(range(len(answers))),
        answers=numbered,
        limit=limit,
        ended=np.array([answer.ended for answer in answers], dtype=bool),
        looped=np.array([ends_in_loop(tokens) for tokens in numbered], dtype=bool),
        exact=np.asarray(exact, dtype=bool),
    )


def what_was_forgotten(
    records: Sequence[Record], dense: Sequence[Compared], pruned: Sequence[Compared], *, kept: Collection[str] = ()
) -> Forgotten:
    """What became of general prompts; ``kept`` are the groups that were calibrated with."""
    ids: dict[str, int] = {}
    sides = [free_answers(side, np.zeros(len(side)), 0, ids) for side in (dense, pruned)]
    sums = sums_of([Asked(record) for record in records], pruned, dense)
    shown = [
        Answered(str(record.prompt), theirs.text.strip(), ours.text.strip())
        for record, theirs, ours in zip(records, dense, pruned, strict=True)
    ]
    groups = [record.group or "" for record in records]
    looped = sides[0].looped, sides[1].looped
    return by_group(groups, shown, sums.kl, measured_tokens(pruned), looped, kept=kept, kl_is_bound=True)


def truncation(answers: Sequence[Compared], top: int) -> str:
    """How much of a KL divergence the most likely tokens show, in one sentence."""
    measured = sum(answer.measured for answer in answers)
    if not measured:
        return "KL was not measured, because no likely tokens were named; answers were compared word by word."
    seen = 1 - sum(answer.unnamed for answer in answers) / measured
    return (
        f"KL is a lower bound, from the {top} most likely tokens of both models, all others taken as one, at "
        f"{measured:,} tokens up to where the answers part; the dense model's named tokens hold "
        f"{readable_share(floor(seen * 1000) / 1000)} of its probability."
    )


def question_key(models: Sequence[ServedModel], record: Record, max_tokens: int) -> str:
    """Names a question to these models, for a later run."""
    who = [[m.server.base, m.model, m.top_logprobs, m.chat, dict(m.template_args)] for m in models]
    what = [record.prompt, record.messages, record.tools, max_tokens]
    return hashlib.sha256(json.dumps([who, what], sort_keys=True, default=str).encode()).hexdigest()
