"""A calibration set on its way from records to tokenised examples, with answers where they are missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from shape_moe.calibration.conversations import read_messages
from shape_moe.calibration.examples import Example, Tokeniser, TokenOptions
from shape_moe.calibration.records import DataOptions, Record, content_hash
from shape_moe.calibration.responses import Reply, fetch_answers
from shape_moe.calibration.seen_prompts import PROMPTS_KEY, SALT_KEY, new_salt, salted_hash
from shape_moe.errors import DataError, UsageError
from shape_moe.progress import Progress
from shape_moe.units import counted
from shape_moe.workspace import write_json

ANSWERS_FILE = "answers.json"
SPLIT_KEY = "split_sentence"
"""In a trace's source: how its examples were told from held-out ones, where the source was split in two."""


class Answerer(Protocol):
    """Lets a model answer prompts; see :func:`shape_moe.calibration.responses.generate_answers`."""

    def __call__(
        self,
        tokeniser: Tokeniser,
        records: Sequence[Record],
        *,
        max_new_tokens: int,
        known: Mapping[int, list[int]],
        keep: Callable[[dict[int, list[int]]], None],
        progress: Callable[[int], None],
    ) -> dict[int, list[int]]:
        """Answer tokens by record index."""


@dataclass(frozen=True)
class AnswerOptions:
    """What happens to prompts without a response, and to records that cannot be used.

    Attributes:
        max_new_tokens: length of answers; 0 gives none.
        responses_from: take answers from this OpenAI-compatible endpoint instead of the model itself.
        batch_size: prompts per batch.
        max_tokens: stop adding examples once this many tokens are there.
        skip_bad: leave records that fail out, and count them.
    """

    max_new_tokens: int = 512
    responses_from: str | None = None
    batch_size: int = 8
    max_tokens: int = 100_000
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_tokens", 1), ("max_new_tokens", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}.")


class ExampleMaker:
    """Turns the records of one source into examples.

    Args:
        records: the records; they are tokenised at once, so that bad ones show before any weight is loaded.
        tokeniser: for the model's tokenizer.
        data: where the records come from, for the provenance.
        options: see :class:`AnswerOptions`.
        progress: where to show progress.
        skipped: records that were left out while they were read.

    Attributes:
        skipped: why records were left out, by their place.
        examples: what :meth:`run` made.

    Raises:
        DataError: for a record that cannot be used, unless such are skipped, and when limits leave no response.
    """

    def __init__(
        self,
        records: list[Record],
        tokeniser: Tokeniser,
        data: DataOptions,
        options: AnswerOptions,
        progress: Progress,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.tokeniser, self.data, self.options, self.progress = tokeniser, data, options, progress
        self.skipped: dict[str, str] = dict(skipped or {})
        self.examples: list[Example] = []
        self.content_hash = content_hash(records)
        self._salt = new_salt()
        self._checked: dict[int, Example] = {}
        for record in records:
            example = self._attempt(record, [] if record.lacks_response else None)
            if example is not None:
                self._checked[record.index] = example
        self.records = [record for record in records if record.index in self._checked]
        self.open = [record for record in self.records if record.lacks_response]
        self._check_lengths()
        for note in tokeniser.fresh_notes():
            progress.note(note)

    def _check_lengths(self) -> None:
        """Say how many responses the limit of tokens cuts off.

        Raises:
            DataError: when none is left of any.
        """
        limit, wanted = self.tokeniser.limit, self.options.max_new_tokens
        examples = [self._checked[record.index] for record in self.records]
        asked = [self._checked[record.index] for record in self.open]
        crowded = [e for e in asked if wanted and self.tokeniser.room(len(e.tokens), wanted) == 0]
        gone = [e for e in examples if e.lost and not e.spans] + crowded
        answered = [e for e in examples if e.spans or e.lost] + (asked if wanted else [])
        cut = sum(example.truncated for example in examples)
        if not cut and not crowded:
            return
        if answered and len(gone) == len(answered):
            raise DataError(
                f"{limit} tokens leave no response: each of the {len(gone)} prompts of {self.data.name} is that long "
                "already; a larger --max-length keeps some."
            )
        note = f"{cut} of {len(examples)} examples are cut to {limit} tokens"
        self.progress.note(f"{note}; {len(gone)} of them lose their whole response." if gone else f"{note}.")

    def run(self, answerer: Callable[[], Answerer], folder: Path | None) -> list[Example]:
        """Answer and tokenise.

        Args:
            answerer: gives what lets the model answer; called only when it has to.
            folder: where answers are kept for a later run, None for nowhere.

        Raises:
            DataError: when no record can be used.
        """
        records, answers = self._answered(answerer, folder)
        tokens = 0
        for record in records:
            if tokens >= self.options.max_tokens:
                self.progress.note(
                    f"Stopped adding examples at {tokens:,} tokens ({len(self.examples)} of {len(records)} records); "
                    "--max-tokens raises the limit."
                )
                break
            example = self._example(record, answers.get(record.index))
            if example is not None:
                self.examples.append(example)
                tokens += len(example.tokens)
        if not self.examples:
            raise DataError(f"No record of {self.data.name} could be used.")
        return self.examples

    def _answered(
        self, answerer: Callable[[], Answerer], folder: Path | None
    ) -> tuple[list[Record], Mapping[int, list[int] | Reply]]:
        """The records that can go on, and answers by index: tokens from the model itself, texts from an endpoint."""
        if not self.open or not self.options.max_new_tokens:
            return self.records, {}
        file = folder / ANSWERS_FILE if folder is not None else None
        known: dict[int, Any] = {}
        if file is not None and file.is_file():
            known = {int(key): value for key, value in json.loads(file.read_text(encoding="utf-8")).items()}

        def keep(answers: dict[int, Any]) -> None:
            if file is not None:
                write_json(file, answers)

        missing = len(self.open) - len(known)
        if known and missing:
            self.progress.note(f"{len(known):,} of {counted(len(self.open), 'answer')} already there.")
        if self.options.responses_from:
            with self.progress.phase("Fetching answers", missing, "answer") as advance:
                texts = self._fetch(known, keep, advance)
            return [record for record in self.records if self._has_text(record, texts)], texts
        if not missing:
            return self.records, known
        answer = answerer()
        with self.progress.phase("Answering prompts", missing, "answer") as advance:
            answers = answer(
                self.tokeniser,
                self.open,
                max_new_tokens=self.options.max_new_tokens,
                known=known,
                keep=keep,
                progress=advance,
            )
        return self.records, answers

    def _fetch(
        self, known: dict[int, Reply], keep: Callable[[dict[int, Any]], None], advance: Callable[[int], None]
    ) -> dict[int, Reply]:
        assert self.options.responses_from is not None
        return fetch_answers(
            self.options.responses_from,
            self.open,
            max_new_tokens=self.options.max_new_tokens,
            template=self.tokeniser.uses_template,
            template_args=dict(self.tokeniser.options.template_args),
            known=known,
            keep=keep,
            progress=advance,
        )

    def _has_text(self, record: Record, texts: Mapping[int, Reply]) -> bool:
        if not record.lacks_response or texts[record.index]:
            return True
        message = f"{record.where}: the endpoint gave an empty answer."
        if not self.options.skip_bad:
            raise DataError(message)
        self.skipped[record.where] = message
        return False

    def _example(self, record: Record, answer: list[int] | Reply | None) -> Example | None:
        """The record's tokens: those of the check, unless an answer has come to them."""
        if answer is None:
            return self._checked[record.index]
        if isinstance(answer, str | dict):
            return self._attempt(_with_response(record, answer), None)
        return self._attempt(record, answer)

    def _attempt(self, record: Record, answer: list[int] | None) -> Example | None:
        try:
            return self.tokeniser.example(record, answer)
        except DataError as error:
            if not self.options.skip_bad:
                raise
            self.skipped[record.where] = str(error)
            return None

    @property
    def drafts(self) -> list[Example]:
        """The examples as far as they are known before anything is answered, in the order of the records."""
        return [self._checked[record.index] for record in self.records]

    def longest(self) -> int:
        """The most tokens that an example can have, an answer that is still missing included."""
        if self.examples:
            return max(len(example.tokens) for example in self.examples)
        lengths = []
        for record in self.records:
            length = len(self._checked[record.index].tokens)
            missing = record.lacks_response and self.options.max_new_tokens
            lengths.append(length + (self.tokeniser.room(length, self.options.max_new_tokens) if missing else 0))
        return max(lengths, default=1)

    def source(self) -> dict[str, Any]:
        """Where the examples come from and how they were made, for the trace."""
        data, options = self.data, self.options
        answered = "none"
        if self.open and options.max_new_tokens:
            answered = options.responses_from or "the model"
        by_index = {record.index: record for record in self.records}
        return {
            "data": data.name,
            "sources": list(data.sources),
            "in_memory": len(data.files) < len(data.sources),
            "classes": list(data.classes) if data.also else None,
            "weights": list(data.weights),
            "format": data.format,
            "split": data.split,
            "subset": data.subset,
            "fields": dict(data.fields) if data.fields else None,
            "seed": data.seed,
            "samples": data.samples,
            "stratify": data.stratify,
            "label": data.label,
            "content_hash": self.content_hash,
            "records": [example.index for example in self.examples],
            SALT_KEY: self._salt,
            PROMPTS_KEY: [salted_hash(by_index[example.index], self._salt) for example in self.examples],
            "truncated": sum(example.truncated for example in self.examples),
            "skipped": dict(self.skipped),
            "answers_missing": len(self.open),
            "answers_from": answered,
            "max_new_tokens": options.max_new_tokens,
            "template": self.tokeniser.uses_template,
            "template_hash": self.tokeniser.template_hash,
            "template_args": dict(self.tokeniser.options.template_args),
            "turns": self.tokeniser.options.turns,
            "chat_template": self.tokeniser.options.chat_template,
            "tokenizer": self.tokeniser.options.tokenizer,
            "max_length": self.tokeniser.options.max_length,
        }


def options_of(source: Mapping[str, Any]) -> tuple[DataOptions, TokenOptions, AnswerOptions]:
    """How to read more examples of a traced source: the options that :meth:`ExampleMaker.source` describes.

    The number of samples, the seed and what is stratified by are not among them.

    Raises:
        UsageError: for a source that was handed over by a Python program.
    """
    if source.get("in_memory"):
        raise UsageError("The trace was made from records in memory: give examples to judge by (--held-out).")
    first, *also = source.get("sources") or [str(source["data"])]
    data = DataOptions(
        first,
        split=source.get("split"),
        subset=source.get("subset"),
        fields=source.get("fields"),
        also=tuple(also),
        weights=tuple(source.get("weights") or ()),
        format=source.get("format"),
    )
    tokens = TokenOptions(
        template=bool(source.get("template", True)),
        template_args=source.get("template_args") or {},
        max_length=source.get("max_length"),
        turns=source.get("turns", "all"),
        chat_template=source.get("chat_template"),
        tokenizer=source.get("tokenizer"),
    )
    return data, tokens, AnswerOptions(int(source.get("max_new_tokens", AnswerOptions.max_new_tokens)))


def _with_response(record: Record, answer: Reply) -> Record:
    if record.messages is not None:
        said = {"role": "assistant", **(answer if isinstance(answer, dict) else {"content": answer})}
        return replace(record, messages=(*record.messages, *read_messages([said], record.where)))
    return replace(record, response=str(answer.get("content", "") if isinstance(answer, dict) else answer))
