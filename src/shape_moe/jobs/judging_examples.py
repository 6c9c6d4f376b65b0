"""Which examples a written model is judged by: those that it was not made from, wherever they can be found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.example_maker import options_of
from shape_moe.calibration.parts import Parts, three_parts
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions, Record, short_name
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import DataError
from shape_moe.evaluation.subjects import seen_by
from shape_moe.jobs.held_out import fresh_records
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.progress import Progress
from shape_moe.tracing.trace import Trace

OTHERS = "Give others with --data"


@dataclass(frozen=True)
class Unseen:
    """Examples to judge a model by.

    Attributes:
        session: the full model, and how examples are read.
        data: where they come from.
        parts: the examples, and why some classes have none.
        note: what a reader should know of them; empty where there is nothing.
    """

    session: ModelSession
    data: DataOptions
    parts: Parts
    note: str = ""


def examples_of_trace(
    snapshot: Snapshot, trace: Trace, options: JudgementOptions, where: Mapping[str, Any], progress: Progress
) -> Unseen:
    """Examples of the sources of a trace, merged or not, that it has not seen.

    Args:
        snapshot: the model.
        trace: the trace.
        options: how many to report by.
        where: how the model runs: ``device``, ``dtype`` and ``stream`` of :class:`ExampleOptions`.
        progress: where to show progress.

    Raises:
        DataError: saying why there are none.
    """
    reading = [replace(read, **where) for read in _reading(trace)]
    if len({repr((read.tokens, read.answers)) for read in reading}) > 1:
        raise DataError("The merged traces were made with different templates or token limits.")
    parts = unseen_parts([read.data for read in reading], seen_by(trace, None), (), options)
    if not parts.report:
        raise DataError(f"{'; '.join(f'{name}: {why}' if name else why for name, why in parts.unmeasured.items())}.")
    session = ModelSession.open(snapshot, reading[0], None, progress, parts.report)
    return Unseen(session, reading[0].data, parts)


def _reading(trace: Trace) -> list[ExampleOptions]:
    """How the examples of a trace are read, one entry for each of its sources.

    Raises:
        DataError: when the trace does not say.
    """
    found: list[ExampleOptions] = []
    for source in _sources(trace.info.source):
        if source.get("in_memory"):
            raise DataError(f"The trace was made from records in memory. {OTHERS}.")
        if not source.get("data"):
            raise DataError(f"The trace does not say where its examples are. {OTHERS}.")
        data, tokens, answers = options_of(source)
        data = replace(data, stratify=source.get("stratify"), label=source.get("label"))
        read = ExampleOptions(data, tokens, answers)
        if read not in found:
            found.append(read)
    return found


def _sources(source: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The sources of a trace, those of a merged one in turn."""
    for part in source.get("merged") or ():
        yield from _sources(part)
    if "merged" not in source:
        yield source


def unseen_parts(
    sources: Sequence[DataOptions],
    seen: SeenPrompts,
    chosen_by: Sequence[Record],
    options: JudgementOptions,
    *,
    trusted: bool = False,
) -> Parts:
    """Records that nothing has seen, to report by; none, with the reason, where there are none.

    Args:
        sources: where they may come from; each of several is a class of its own.
        seen: what was calibrated on.
        chosen_by: records that something was chosen by.
        options: how many to report by.
        trusted: whether records count although it is not known what calibration has seen.
    """
    if not seen.complete and not trusted:
        return Parts([], [], [], {"": "the trace does not name its prompts"}, "")
    both = SeenPrompts((*seen.parts, *SeenPrompts.of_records(chosen_by).parts))
    names, unmeasured = _class_names(sources), {}
    records: list[Record] = []
    for data, name in zip(sources, names, strict=True):
        try:
            fresh, _ = fresh_records(data, both, options.examples)
        except DataError as error:
            unmeasured[name or ""] = str(error).rstrip(".")
            continue
        start = 1 + max((record.index for record in records), default=-1)
        records += [replace(r, index=start + r.index, group=r.group or name) for r in fresh]
    parts = three_parts([], records, calibration=0, most=options.examples, give_up=False, seed=sources[0].seed)
    return replace(parts, unmeasured={**unmeasured, **parts.unmeasured})


def _class_names(sources: Sequence[DataOptions]) -> list[str | None]:
    """What the classes of several sources are called: short names, where those tell them apart."""
    if len(sources) == 1:
        return [None]
    short = [short_name(data.source) for data in sources]
    return [name if short.count(name) == 1 else data.name for name, data in zip(short, sources, strict=True)]


def examples_given(session: ModelSession, seen: SeenPrompts, options: JudgementOptions) -> Unseen:
    """The examples that the user gave to judge by, without those that calibration has seen.

    Args:
        session: reads them.
        seen: what was calibrated on.
        options: how many to report by.
    """
    data = session.options.data
    parts = unseen_parts([data], seen, (), options, trusted=True)
    note = "" if seen.complete else "It is not known whether calibration has seen these examples."
    return Unseen(session, data, parts, note)


def session_for(given: ExampleOptions, snapshot: Snapshot, progress: Progress) -> ModelSession:
    """The full model, reading examples that are only judged by; they are looked at before weights are loaded.

    Raises:
        ShapeMoeError: when the model, its tokenizer or the examples cannot be used.
    """
    first = load_records(replace(given.data, samples=1), progress)
    return ModelSession.open(snapshot, replace(given, keep_also=()), None, progress, first)
