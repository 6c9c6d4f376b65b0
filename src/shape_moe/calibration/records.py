"""Task examples as users keep them: JSONL, JSON, CSV, Parquet or a Hugging Face dataset."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shape_moe.calibration.presets import check_split, find_preset, local_copy, preset_rows
from shape_moe.calibration.sources import FIELDS, Rows, read_rows
from shape_moe.errors import DataError, UsageError

_ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One task example, checked but not yet tokenised.

    Exactly one of ``text``, ``prompt`` and ``messages`` is set; ``response`` goes with ``prompt``.

    Attributes:
        index: position in the source, from 0.
        where: file and line (or row), for messages.
        group: value of the field to stratify by.
    """

    index: int
    where: str
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: tuple[Message, ...] | None = None
    group: str | None = None

    @property
    def lacks_response(self) -> bool:
        """Whether the model (or an endpoint) has to answer before this record can be traced."""
        if self.messages is not None:
            return bool(self.messages[-1]["role"] != "assistant")
        return self.text is None and self.response is None


@dataclass(frozen=True)
class DataOptions:
    """Where records come from and which of them are used.

    Attributes:
        source: a file, a folder written by ``datasets.save_to_disk``, a dataset name on the hub, or a preset
            (``preset:NAME``, ``preset:NAME@PATH``; see :mod:`shape_moe.calibration.presets`).
        split: split of a dataset; None becomes ``train``, or what the preset says.
        subset: configuration of a hub dataset.
        fields: our field name to the source's field name, where they differ.
        samples: how many records to use, None for all.
        stratify: field whose values get equal numbers of samples.
        seed: draws the samples when the source has more.

    Raises:
        UsageError: for an unknown field name or preset, a split or subset that the preset does not have, and for fewer
            than one sample.
    """

    source: str
    split: str | None = None
    subset: str | None = None
    fields: Mapping[str, str] | None = None
    samples: int | None = None
    stratify: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.fields or ()) - set(FIELDS))
        if unknown:
            raise UsageError(f"--map names {unknown[0]!r}, which is not one of {', '.join(FIELDS)}.")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"samples must be at least 1, not {self.samples}.")
        preset = find_preset(self.source)
        if self.split is None:
            object.__setattr__(self, "split", preset.default_split if preset else "train")
        if preset:
            check_split(preset, str(self.split), self.subset)


def load_records(options: DataOptions) -> list[Record]:
    """Read, check and sample the records of a source; the sample keeps the source's order.

    Raises:
        DataError: for a missing or malformed source or record, or when no record is there.
    """
    rows = _rows(options)
    records = [make_record(row, i, where, options) for i, (where, row) in enumerate(rows)]
    if not records:
        raise DataError(f"{options.source} holds no records: at least one task example is needed.")
    return sample_records(records, options)


def content_hash(records: Iterable[Record]) -> str:
    """sha256 over the content of records, independent of the file format that held them."""
    digest = hashlib.sha256()
    for record in records:
        content = [record.text, record.prompt, record.response, record.messages]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"


def prompt_hash(record: Record) -> str:
    """The first 16 hex digits of a sha256 over what a record asks, whatever file format held it.

    A trace keeps these hashes of its calibration set, so that later steps can tell whether an example that should be
    held out was used for calibration. Responses do not count, and runs of whitespace are one space. A prompt, a text
    and a conversation of one user message are the same question when their words are.

    Args:
        record: the record; of messages, a final one of the assistant is the response, and of each only role and
            content are looked at.
    """
    if record.messages is not None:
        asked = record.messages if record.lacks_response else record.messages[:-1]
        turns = [(str(message["role"]), str(message["content"])) for message in asked]
    else:
        turns = [("user", str(record.prompt if record.text is None else record.text))]
    content = json.dumps([(role, " ".join(text.split())) for role, text in turns])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def make_record(row: Mapping[str, Any], index: int, where: str, options: DataOptions) -> Record:
    """Check one raw row and turn it into a record.

    Raises:
        DataError: naming ``where`` and what is wrong.
    """
    names = {name: (options.fields or {}).get(name, name) for name in FIELDS}
    values = {name: row.get(source) for name, source in names.items()}
    kinds = [name for name in ("text", "prompt", "messages") if values[name] is not None]
    if len(kinds) != 1:
        if kinds:
            advice = f"leave all but one out, or hide one with --map {kinds[-1]}=NO_SUCH_FIELD"
            raise DataError(f"{where}: a record must have only one of {' and '.join(kinds)}; {advice}.")
        raise DataError(
            f"{where}: a record needs one of the fields text, prompt or messages, but has only "
            f"{', '.join(map(str, row)) or 'nothing'}; --map prompt=YOUR_FIELD names another field."
        )
    for name in ("text", "prompt", "response"):
        if values[name] is not None and not isinstance(values[name], str):
            raise DataError(f"{where}: field {names[name]!r} must be text, not {type(values[name]).__name__}.")
    if kinds[0] in ("text", "prompt") and not values[kinds[0]]:
        raise DataError(f"{where}: field {names[kinds[0]]!r} is empty.")
    group = None
    if options.stratify is not None:
        if row.get(options.stratify) is None:
            raise DataError(f"{where}: the record has no field {options.stratify!r} to stratify by.")
        group = str(row[options.stratify])
    messages = _check_messages(values["messages"], where)
    return Record(index, where, values["text"], values["prompt"], values["response"] or None, messages, group)


def _check_messages(messages: Any, where: str) -> tuple[Message, ...] | None:
    if messages is None:
        return None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one message.")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"{where}: every message needs a role, one of {', '.join(_ROLES)}.")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: every message needs a content that is text.")
    return tuple(messages)


def sample_records(records: list[Record], options: DataOptions) -> list[Record]:
    """Draw as many records as the options ask for, in equal numbers per class where they stratify."""
    if options.samples is None or options.samples >= len(records):
        return records
    rng = random.Random(options.seed)
    groups: dict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.group].append(record)
    decks = [rng.sample(groups[key], len(groups[key])) for key in sorted(groups, key=str)]
    chosen: list[Record] = []
    while len(chosen) < options.samples:
        for deck in decks:
            if deck and len(chosen) < options.samples:
                chosen.append(deck.pop())
    return sorted(chosen, key=lambda record: record.index)


def _rows(options: DataOptions) -> Rows:
    preset, split = find_preset(options.source), str(options.split)
    if preset is not None:
        return preset_rows(preset, local_copy(options.source), split)
    return read_rows(options.source, options.subset, split)
