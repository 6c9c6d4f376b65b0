"""Task examples as users keep them: read from any source, made one shape, and drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import PurePath
from typing import Any, cast

from shape_moe.calibration.presets import PREFIX, check_split, find_preset
from shape_moe.calibration.schema import Message
from shape_moe.calibration.shapes import FIELDS, FORMATS
from shape_moe.calibration.sources import IN_MEMORY, Data, InMemory
from shape_moe.errors import UsageError


@dataclass(frozen=True)
class Record:
    """One task example, checked but not yet tokenised.

    Exactly one of ``text``, ``prompt`` and ``messages`` is set; ``response`` goes with ``prompt``, ``tools`` with
    ``messages``. See :class:`shape_moe.calibration.schema.Content`.

    Attributes:
        index: position in the source, from 0; in several sources one after the other.
        where: file and line (or row), for messages.
        group: class of the record: value of a field, or its source where there are several; None without classes.
    """

    index: int
    where: str
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: tuple[Message, ...] | None = None
    group: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None

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
        source: a file, a folder of data files, a dataset name on the hub (``NAME@REVISION`` for a revision), a preset
            (``preset:NAME``, ``preset:NAME@PATH``; see :mod:`shape_moe.calibration.presets`), a list of dictionaries or
            a ``datasets.Dataset``. Paths are literal.
        split: split of a dataset; None becomes ``train``, or what the preset says.
        subset: configuration of a hub dataset.
        fields: our field name to the source's field name, where they differ.
        samples: how many records to use, None for all.
        stratify: field whose values get equal numbers of samples.
        seed: draws the samples when the source has more.
        also: further sources. Each of several sources is a class of its own, named after it, and gets as many samples
            as the others.
        weights: one number per source: how many examples each gives, relative to the others; empty for equal numbers
            while they last.
        format: the shape of the records (one of :data:`shape_moe.calibration.shapes.FORMATS`), None to recognise it.
        skip_bad: leave rows that cannot be read out, and count them.
        label: field whose values are classes, without a say in how many of each are drawn; None to recognise it (see
            :mod:`shape_moe.calibration.named_classes`), empty for none. It is not looked at where ``stratify`` or
            several sources make classes.

    Raises:
        UsageError: for an unknown field name, format or preset, a split or subset that the preset does not have,
            weights that do not fit, and for fewer than one sample.
    """

    source: str
    split: str | None = None
    subset: str | None = None
    fields: Mapping[str, str] | None = None
    samples: int | None = None
    stratify: str | None = None
    seed: int = 0
    also: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    format: str | None = None
    skip_bad: bool = False
    label: str | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.fields or ()) - set(FIELDS))
        if unknown:
            raise UsageError(f"--map names {unknown[0]!r}, which is not one of {', '.join(FIELDS)}.")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"samples must be at least 1, not {self.samples}.")
        if self.format is not None and self.format not in FORMATS:
            raise UsageError(f"There is no format {self.format!r}; use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
        self._name_sources()
        if self.weights and (len(self.weights) != len(self.sources) or min(self.weights) <= 0):
            raise UsageError(f"{len(self.sources)} sources need as many weights, each above 0.")
        found = [find_preset(source) for source in self.sources]
        if self.split is None:
            object.__setattr__(self, "split", found[0].default_split if found[0] else "train")
        for preset in found:
            if preset:
                check_split(preset, str(self.split), self.subset)

    def _name_sources(self) -> None:
        """Paths become text, and rows in memory get a name."""
        given: tuple[Any, ...] = (self.source, *self.also)
        names = []
        for place, source in enumerate(given, start=1):
            if isinstance(source, str | PathLike):
                names.append(source if isinstance(source, str) else fspath(source))
            else:
                names.append(InMemory.of(source, f"{IN_MEMORY} {place}" if self.also else IN_MEMORY))
        object.__setattr__(self, "source", names[0])
        object.__setattr__(self, "also", tuple(names[1:]))

    @classmethod
    def of(cls, data: Data, **options: Any) -> DataOptions:
        """Options for one source of any kind; ``options`` are the attributes."""
        return cls(cast("str", data), **options)

    @property
    def sources(self) -> tuple[str, ...]:
        """All sources by name."""
        return (self.source, *self.also)

    @property
    def files(self) -> list[str]:
        """The sources that may be files or folders."""
        return [source for source in self.sources if not isinstance(source, InMemory)]

    @property
    def name(self) -> str:
        """The sources, for people."""
        return " + ".join(self.sources)

    @property
    def classes(self) -> tuple[str | None, ...]:
        """The class of each source's records: its short name where there are several sources, else None."""
        if not self.also:
            return (None,)
        short = [short_name(source) for source in self.sources]
        return tuple(
            name if short.count(name) == 1 else source for name, source in zip(short, self.sources, strict=True)
        )


def content_hash(records: Iterable[Record]) -> str:
    """sha256 over the content of records, independent of the file format that held them."""
    digest = hashlib.sha256()
    for record in records:
        content: list[Any] = [record.text, record.prompt, record.response, record.messages]
        content += [record.tools] if record.tools else []
        digest.update(json.dumps(content, sort_keys=True).encode())
    return f"sha256:{digest.hexdigest()}"


def prompt_hash(record: Record) -> str:
    """The first 16 hex digits of a sha256 over what a record asks, whatever file format held it.

    A trace keeps these hashes of its calibration set, so that later steps can tell whether an example that should be
    held out was used for calibration. Responses do not count, and runs of whitespace are one space. A prompt, a text
    and a conversation of one user message are the same question when their words are.

    Args:
        record: the record; of messages, a final one of the assistant is the response, and of each only role, content
            and tool calls are looked at.
    """
    if record.messages is not None:
        asked = record.messages if record.lacks_response else record.messages[:-1]
        turns = [(str(message["role"]), _said(message)) for message in asked]
    else:
        turns = [("user", str(record.prompt if record.text is None else record.text))]
    content = json.dumps([(role, " ".join(text.split())) for role, text in turns])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    return str(message["content"] or "") + (json.dumps(calls, sort_keys=True) if calls else "")


def short_name(source: str) -> str:
    """A source's name without folder, suffix and revision."""
    name = PurePath(source.removeprefix(PREFIX)).name
    return (
        name.partition("@")[0] if source.startswith(PREFIX) or "." not in name else name.partition(".")[0]
    ) or source
