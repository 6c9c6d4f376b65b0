"""What a pruned model has forgotten of what nobody calibrated for: short prompts of many kinds, answered by both."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shape_moe.architectures.loading import vocabulary_size
from shape_moe.calibration.records import Record
from shape_moe.calibration.responses import generate_answers, greedy_answers, pad_token_id, stop_ids
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import UsageError
from shape_moe.evaluation.dense_reference import DenseReference
from shape_moe.evaluation.generation import ends_in_loop
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.teacher_forced import compare_with_dense, record_dense
from shape_moe.progress import Advance
from shape_moe.text import one_line
from shape_moe.units import kl_at_least, readable_kl

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shape_moe.calibration.examples import Tokeniser

SOURCE = "general prompts"
ANSWER_TOKENS = 64
"""Answers are cut off after so many tokens: enough to see a loop."""
LANGUAGES = ("german", "french", "spanish", "chinese", "japanese")
_SHOWN = 300


def prompts() -> dict[str, list[str]]:
    """The prompts by group: arithmetic, code, JSON, five languages, refusals, small talk and general knowledge."""
    text = (files("shape_moe.evaluation") / "forgotten.toml").read_text(encoding="utf-8")
    return {group: list(entry["prompts"]) for group, entry in tomllib.loads(text).items()}


def general_records(groups: Sequence[str] | None = None) -> list[Record]:
    """The prompts as records whose class is their group; the model answers them itself.

    Args:
        groups: those to take, None for all.

    Raises:
        UsageError: for a group that does not exist.
    """
    known = prompts()
    unknown = sorted(set(groups or ()) - set(known))
    if unknown:
        raise UsageError(
            f"There is no group {unknown[0]!r} of general prompts; there are {', '.join(known)} and languages."
        )
    asked = [(group, prompt) for group, texts in known.items() if groups is None or group in groups for prompt in texts]
    return [Record(i, f"{SOURCE}, {group}", prompt=prompt, group=group) for i, (group, prompt) in enumerate(asked)]


def group_names(given: Sequence[str]) -> tuple[str, ...]:
    """Groups as people name them: in any case, and ``languages`` for the five of them.

    Raises:
        UsageError: for a group that does not exist.
    """
    names: list[str] = []
    for name in given:
        names += LANGUAGES if name.strip().lower() == "languages" else (name.strip().lower(),)
    if names:
        general_records(names)
    return tuple(dict.fromkeys(names))


def kept_groups(seen: SeenPrompts) -> frozenset[str]:
    """The groups that calibration has asked, half of their prompts or more."""
    found = Counter(record.group for record in general_records() if record in seen)
    return frozenset(group for group, texts in prompts().items() if 2 * found[group] >= len(texts))


@dataclass(frozen=True)
class Answered:
    """One prompt with both models' answers.

    Attributes:
        prompt: the prompt.
        dense: the dense model's answer.
        pruned: the pruned model's.
    """

    prompt: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class GroupLoss:
    """What became of one group.

    Attributes:
        name: the group.
        prompts: how many prompts.
        kl: KL divergence from the dense model over the tokens of its answers, mean nats per token.
        loops: answers that end in a loop, the dense model's first.
        worst: the prompt at which the models differ most.
        kept: whether the group was calibrated with, so that this is no independent judgement.
    """

    name: str
    prompts: int
    kl: float
    loops: tuple[int, int]
    worst: Answered
    kept: bool = False


@dataclass(frozen=True)
class Forgotten:
    """What a pruned model has forgotten, by group.

    Attributes:
        groups: the groups, the one that lost most first.
        kl_is_bound: whether the KL divergences are known to be that large at least, and may be larger.
    """

    groups: tuple[GroupLoss, ...]
    kl_is_bound: bool = False

    def lines(self) -> list[str]:
        """As people read it: the worst groups, and both answers to a prompt of the worst one."""
        if not self.groups:
            return []
        kl = kl_at_least if self.kl_is_bound else readable_kl
        shown = [f"{group.name} {kl(group.kl)}{_remarks(group)}" for group in self.groups]
        worst = self.groups[0]
        return [
            f"Off the task (KL to the dense model by kind of prompt, worst first): {', '.join(shown)}",
            f"{worst.name}, for example: {worst.worst.prompt}",
            f"  dense:  {_one_line(worst.worst.dense)}",
            f"  pruned: {_one_line(worst.worst.pruned)}",
        ]

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {"groups": [asdict(group) for group in self.groups], "kl_is_bound": self.kl_is_bound}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Forgotten:
        """What :meth:`to_document` described."""
        return cls(
            tuple(
                GroupLoss(
                    str(group["name"]),
                    int(group["prompts"]),
                    float(group["kl"]),
                    (int(group["loops"][0]), int(group["loops"][1])),
                    Answered(**group["worst"]),
                    bool(group.get("kept", False)),
                )
                for group in document["groups"]
            ),
            bool(document.get("kl_is_bound", False)),
        )


def by_group(
    groups: Sequence[str],
    answered: Sequence[Answered],
    kl: ArrayLike,
    tokens: ArrayLike,
    looped: tuple[ArrayLike, ArrayLike],
    *,
    kept: Collection[str] = (),
    kl_is_bound: bool = False,
) -> Forgotten:
    """Sum up by group.

    Args:
        groups: the group of each prompt.
        answered: each prompt with its answers.
        kl: KL divergence over each answer, nats.
        tokens: tokens of each answer that it was measured at.
        looped: which answers end in a loop, the dense model's first.
        kept: groups that were calibrated with.
        kl_is_bound: whether the divergences are lower bounds.
    """
    names, total = np.asarray(groups), np.asarray(kl, dtype=np.float64)
    count = np.asarray(tokens, dtype=np.float64)
    dense, pruned = (np.asarray(side, dtype=bool) for side in looped)
    found = []
    for name in dict.fromkeys(groups):
        rows = np.flatnonzero(names == name)
        mean = total[rows] / np.maximum(count[rows], 1)
        found.append(
            GroupLoss(
                name,
                len(rows),
                float(total[rows].sum() / max(count[rows].sum(), 1)),
                (int(dense[rows].sum()), int(pruned[rows].sum())),
                answered[int(rows[int(mean.argmax())])],
                name in kept,
            )
        )
    found.sort(key=lambda group: (-group.kl, group.loops[0] - group.loops[1], group.name))
    return Forgotten(tuple(found), kl_is_bound)


class GeneralCheck:
    """The general prompts as the dense model answers them, and what other models make of them.

    Args:
        model: the dense model; it answers at once.
        tokeniser: turns prompts into tokens.
        batch_size: prompts per batch.
        records: the prompts, None for all of :func:`general_records`.
        answer_tokens: answers are cut off after so many.
        advance: called with the number of prompts answered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokeniser: Tokeniser,
        *,
        batch_size: int = 8,
        records: Sequence[Record] | None = None,
        answer_tokens: int = ANSWER_TOKENS,
        advance: Advance = lambda _: None,
    ) -> None:
        self.tokeniser, self.answer_tokens = tokeniser, answer_tokens
        self.records = list(records) if records is not None else general_records()
        answers = generate_answers(
            model,
            tokeniser,
            self.records,
            max_new_tokens=answer_tokens,
            batch_size=batch_size,
            progress=advance,
        )
        self.answers = [answers[record.index] for record in self.records]
        pairs = zip(self.records, self.answers, strict=True)
        self.held_out = HeldOutSet(
            SOURCE,
            tuple(tokeniser.example(record, answer) for record, answer in pairs),
            tuple(record.group for record in self.records),
            batch_size,
            pad_token_id(model, tokeniser),
            stop_ids(model),
            vocabulary_size(model),
        )
        self.reference = DenseReference()
        record_dense(model, self.held_out, self.reference)

    def close(self) -> None:
        """Let go of what the dense model said."""
        self.reference.close()

    def compare(
        self, model: PreTrainedModel, advance: Advance = lambda _: None, kept: Collection[str] = ()
    ) -> Forgotten:
        """What another model (masked or loaded from a checkpoint) has forgotten.

        Args:
            model: the model.
            advance: called with the number of prompts done.
            kept: groups that it was calibrated with.
        """
        sums = compare_with_dense(model, self.held_out, self.reference)
        asked = {i: self.tokeniser.prompt(record) for i, record in enumerate(self.records)}
        room = {i: self.tokeniser.room(len(prompt), self.answer_tokens) for i, prompt in asked.items()}
        made: dict[int, list[int]] = {}
        size, pad_id = self.held_out.batch_size, self.held_out.pad_id
        for batch in greedy_answers(model, asked, room, batch_size=size, pad_id=pad_id):
            made |= batch
            advance(len(batch))
        written = [made[i] for i in range(len(self.records))]
        texts = zip(self.records, self.answers, written, strict=True)
        answered = [Answered(str(r.prompt), self._text(theirs), self._text(ours)) for r, theirs, ours in texts]
        groups = [record.group or "" for record in self.records]
        looped = self._looped(self.answers), self._looped(written)
        return by_group(groups, answered, sums.kl, sums.tokens, looped, kept=kept)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokeniser.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    @staticmethod
    def _looped(answers: list[list[int]]) -> NDArray[np.bool_]:
        return np.array([ends_in_loop(answer) for answer in answers])


def _remarks(group: GroupLoss) -> str:
    more = group.loops[1] - group.loops[0]
    found = [f"{more} more of {group.prompts} answers loop"] if more > 0 else []
    found += ["calibrated with, so no independent judgement"] if group.kept else []
    return f" ({'; '.join(found)})" if found else ""


def _one_line(text: str) -> str:
    flat = " ".join(one_line(text).split())
    return f"{flat[:_SHOWN]}..." if len(flat) > _SHOWN else flat or "(nothing)"
