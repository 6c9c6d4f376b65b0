"""Records read and drawn: rows that are not drawn are not parsed."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shape_moe.calibration.named_classes import Labels, in_named_classes, labels_of, unnamed_kinds
from shape_moe.calibration.presets import PresetTable, find_preset, local_copy
from shape_moe.calibration.records import DataOptions, Record
from shape_moe.calibration.shapes import normalise
from shape_moe.calibration.sources import InMemory, Row, Rows, Table, memory_table, open_tables
from shape_moe.errors import DataError
from shape_moe.progress import SILENT, Progress
from shape_moe.units import counted


@dataclass
class Loaded:
    """What was read.

    Attributes:
        records: in the order of the sources.
        skipped: why rows were left out, by their place.
        said: one line per source, for people.
        label: the field whose values are the classes of the records, None where they have none or others.
    """

    records: list[Record] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    label: str | None = None


def load_records(options: DataOptions, progress: Progress = SILENT) -> list[Record]:
    """Read, check and sample the records of a source; the sample keeps the source's order.

    Raises:
        DataError: for a missing or malformed source or record, or when no record is there.
    """
    return load(options, progress).records


def load(options: DataOptions, progress: Progress = SILENT) -> Loaded:
    """As :func:`load_records`, with what there is to say of it.

    Raises:
        DataError: for a missing or malformed source or record, or when no record is there.
    """
    loaded, decks, start = Loaded(), [], 0
    for place, source in enumerate(options.sources):
        deck = _Deck(source, options.classes[place], _tables(options, place), start)
        decks.append(deck)
        start += len(deck)
    reader = _Reader(options, loaded)
    if options.stratify is not None:
        read = [record for deck in decks for record in reader.read(deck, None)]
        loaded.records = sample_records(read, options)
    else:
        loaded.records = _drawn(decks, reader, options)
        if not options.also:
            loaded.records, loaded.label = in_named_classes(loaded.records, reader.labels, options.label)
    if not loaded.records:
        bad = next(iter(loaded.skipped.values()), "")
        raise DataError(
            f"{options.name}: none of {counted(len(loaded.skipped), 'record')} can be used; the first: {bad}"
            if bad
            else f"{options.name} holds no records: at least one task example is needed."
        )
    loaded.said = [reader.sentence(deck, loaded.records) for deck in decks]
    if loaded.label is not None:
        counts = Counter(record.group for record in loaded.records)
        named = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=str))
        loaded.said.append(f"Classes by field {loaded.label!r}: {named} (--stratify none makes them one).")
    elif options.stratify is None and options.label is None and not options.also:
        loaded.said += [said] if (said := unnamed_kinds(loaded.records)) is not None else []
    for line in loaded.said:
        progress.note(line)
    if loaded.skipped:
        first = next(iter(loaded.skipped.values()))
        progress.note(f"{counted(len(loaded.skipped), 'bad record')} skipped; the first: {first}")
    return loaded


def make_record(row: Mapping[str, Any], index: int, where: str, options: DataOptions, group: str | None) -> Record:
    """Check one raw row and turn it into a record.

    Raises:
        DataError: naming ``where`` and what is wrong.
    """
    return _record(normalise(row, where, options.fields, options.format).content, index, where, group)


def sample_records(records: list[Record], options: DataOptions) -> list[Record]:
    """Draw as many records as the options ask for; where there are classes, in equal numbers of each or by weight."""
    groups: dict[str | None, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.group].append(record)
    names = sorted(groups, key=str)
    shares = _shares([len(groups[name]) for name in names], options.samples, _weights(names, options))
    if sum(shares) == len(records):
        return records
    rng = random.Random(options.seed)
    chosen: list[Record] = []
    for name, share in zip(names, shares, strict=True):
        order = rng.sample(groups[name], len(groups[name]))
        chosen += order[len(order) - share :]
    return sorted(chosen, key=lambda record: record.index)


@dataclass
class _Deck:
    """The rows of one source, numbered from ``start``."""

    source: str
    group: str | None
    tables: list[Table]
    start: int

    def __len__(self) -> int:
        return sum(len(table) for table in self.tables)

    def rows(self, wanted: Collection[int] | None) -> Rows:
        """Rows by their place in this source; see :class:`Table`."""
        begin = 0
        for table in self.tables:
            end = begin + len(table)
            inside = None if wanted is None else [place - begin for place in wanted if begin <= place < end]
            if inside is None or inside:
                for place, where, row in table.rows(inside):
                    yield begin + place, where, row
            begin = end

    @property
    def name(self) -> str:
        return self.source if len(self.tables) > 1 else self.tables[0].name


class _Reader:
    """Turns rows into records, and remembers what they were."""

    def __init__(self, options: DataOptions, loaded: Loaded) -> None:
        self.options, self.loaded = options, loaded
        self._said: dict[int, str] = {}
        self._unread: dict[int, tuple[str, ...]] = {}
        self.labels: dict[int, Labels] = {}

    def read(self, deck: _Deck, wanted: Collection[int] | None) -> Iterator[Record]:
        """The good ones among the wanted rows (None for all).

        Raises:
            DataError: for a bad one, unless such are skipped.
        """
        preset = any(isinstance(table, PresetTable) for table in deck.tables)
        for place, where, row in deck.rows(wanted):
            try:
                if isinstance(row, DataError):
                    raise row
                yield self._record(row, deck.start + place, where, deck.group, preset=preset)
            except DataError as error:
                if not self.options.skip_bad:
                    raise DataError(f"{str(error).rstrip('.')}. (--skip-bad leaves such records out.)") from error
                self.loaded.skipped[where] = str(error)

    def _record(self, row: Row, index: int, where: str, group: str | None, *, preset: bool) -> Record:
        if self.options.stratify is not None:
            value = row.get(self.options.stratify)
            if value is None:
                raise DataError(f"{where}: the record has no field {self.options.stratify!r} to stratify by.")
            group = str(value) if group is None else f"{group}/{value}"
        if preset:
            names = {"prompt": "prompt", "response": "response", **(self.options.fields or {})}
            content = {ours: row.get(theirs) for ours, theirs in names.items()}
            normal = normalise(content, where, None, "prompt")
        else:
            normal = normalise(row, where, self.options.fields, self.options.format)
            self._said[index] = normal.said
            self.labels[index] = labels_of(row, self.options.fields)
            self._unread[index] = tuple(name for name in normal.unread if name != self.options.stratify)
        return _record(normal.content, index, where, group)

    def sentence(self, deck: _Deck, records: Sequence[Record]) -> str:
        """What was read of a source, in one line."""
        used = [record.index for record in records if deck.start <= record.index < deck.start + len(deck)]
        asked, total = self.options.samples, len(deck)
        if len(self.options.sources) == 1 and asked is not None and len(used) < asked:
            line = f"{deck.name}: {len(used):,} of {asked:,} asked"
        else:
            line = f"{deck.name}: " + (f"{total:,}" if len(used) == total else f"{len(used):,} of {total:,}")
            line += " record" if total == 1 else " records"
        parts = [deck.tables[0].said] if deck.tables[0].said else []
        shapes = Counter(self._said[index] for index in used if index in self._said)
        parts += [said if len(shapes) == 1 else f"{count:,} {said}" for said, count in shapes.most_common()]
        if unread := sorted({name for index in used for name in self._unread.get(index, ())}):
            parts.append(f"not read: {', '.join(unread)}")
        return "; ".join([line, *parts]) + "."


def _record(content: Mapping[str, Any], index: int, where: str, group: str | None) -> Record:
    messages, tools = content["messages"], content["tools"]
    return Record(
        index,
        where,
        content["text"],
        content["prompt"],
        content["response"],
        tuple(messages) if messages else None,
        group,
        tuple(tools) if tools else None,
    )


def _tables(options: DataOptions, place: int) -> list[Table]:
    source, split = options.sources[place], str(options.split)
    if isinstance(source, InMemory):
        return [memory_table(source, split)]
    preset = find_preset(source)
    if preset is not None:
        return [PresetTable(preset, local_copy(source), split)]
    return open_tables(source, options.subset, split)


def _drawn(decks: list[_Deck], reader: _Reader, options: DataOptions) -> list[Record]:
    """The sample, without parsing what is not in it."""
    named = sorted(decks, key=lambda deck: str(deck.group))
    weights = _weights([deck.group for deck in named], options)
    shares = _shares([len(deck) for deck in named], options.samples, weights)
    rng = random.Random(options.seed)
    chosen: list[Record] = []
    everything = sum(shares) == sum(len(deck) for deck in named)
    for deck, share in zip(named, shares, strict=True):
        if everything:
            chosen += reader.read(deck, None)
            continue
        order = rng.sample(range(len(deck)), len(deck))
        found: list[Record] = []
        while order and len(found) < share:  # a second round where rows turned out bad
            missing = share - len(found)
            wanted, order = order[-missing:], order[:-missing]
            found += reader.read(deck, wanted)
        chosen += found
    return sorted(chosen, key=lambda record: record.index)


def _weights(groups: Sequence[str | None], options: DataOptions) -> list[float] | None:
    """The weight of each class; None where all are equal and take what the others cannot give."""
    by_class = dict(zip(options.classes, options.weights, strict=False))
    return [by_class[group] for group in groups] if options.weights and set(groups) <= set(by_class) else None


def _shares(counts: Sequence[int], samples: int | None, weights: Sequence[float] | None) -> list[int]:
    """How many of each class are taken.

    Args:
        counts: how many there are.
        samples: how many are wanted together, None for all.
        weights: their exact proportion; None for equal numbers, where the others make up for a class that has too few.
    """
    total = sum(counts) if samples is None else min(samples, sum(counts))
    if weights is not None:
        whole = sum(weights)
        total = min([total, *(int(count * whole / weight) for count, weight in zip(counts, weights, strict=True))])
        exact = [total * weight / whole for weight in weights]
        shares = [min(int(share), count) for share, count in zip(exact, counts, strict=True)]
        by_rest = sorted(range(len(shares)), key=lambda i: (-(exact[i] - shares[i]), i))
        for place in by_rest[: total - sum(shares)]:
            shares[place] += shares[place] < counts[place]
        return [max(share, min(1, count)) for share, count in zip(shares, counts, strict=True)]
    shares = [0] * len(counts)
    while total:
        open_ones = [place for place, count in enumerate(counts) if shares[place] < count]
        for place in open_ones[:total]:
            step = max(1, min(total // len(open_ones), counts[place] - shares[place]))
            shares[place] += step
        total = (sum(counts) if samples is None else min(samples, sum(counts))) - sum(shares)
    return shares
