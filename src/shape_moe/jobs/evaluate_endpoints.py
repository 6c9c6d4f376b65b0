"""The verdict on models that run elsewhere: behind OpenAI-compatible servers, as they are really served."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions, Record
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.calibration.sources import Data
from shape_moe.errors import DataError, UsageError
from shape_moe.evaluation import forgotten, tool_check
from shape_moe.evaluation.conclusion import conclude_over
from shape_moe.evaluation.evaluated import Evaluated, Evaluation
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.judging_time import Amounts, amounts_within, left_out
from shape_moe.evaluation.outcomes import FREE_ANSWERS
from shape_moe.evaluation.served_answers import TOP_LOGPROBS, ServedModel
from shape_moe.evaluation.served_comparison import (
    Asked,
    Compared,
    answer_room,
    ask_all,
    free_answers,
    measured_tokens,
    question_key,
    sums_of,
    truncation,
    what_was_forgotten,
)
from shape_moe.evaluation.spread import spread_over_classes
from shape_moe.evaluation.tool_calls import ToolExample
from shape_moe.evaluation.verdict import MAX_DROP, Verdict, check_max_drop
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.judging_plan import LEAST, check_minutes
from shape_moe.jobs.session import ExampleOptions, as_example_options
from shape_moe.journal import Journal
from shape_moe.made_with import MadeWith
from shape_moe.openai_server import TIMEOUT_SECONDS, OpenAIServer
from shape_moe.progress import SILENT, Progress
from shape_moe.source_files import WatchedFiles
from shape_moe.tracing.trace import load_trace
from shape_moe.units import counted, joined, readable_duration

clock: Callable[[], float] = time.perf_counter
DENSE = "dense"
"""The endpoint of this name is the reference; without one, the first is."""


@dataclass(frozen=True)
class EndpointOptions:
    """How served models are asked.

    Attributes:
        models: the name under which a server has its model, by endpoint; the empty name stands for all endpoints. A
            server's first model is asked where none is named.
        by: field of the records whose classes are judged one by one.
        answer_pattern: regular expression of the part of an answer that must be right, None for all of it.
        max_new_tokens: the longest answer, None for a quarter more than the longest one of the data.
        max_drop: the fall, as a share, that the verdict *safe* allows.
        general: ask general prompts as well.
        trace: the trace that the pruned models were made from: what it has seen does not count.
        top_logprobs: how many tokens a server names at each step; with 0 answers are compared word by word, without KL.
        timeout: seconds after which an answer is no longer waited for.
        minutes: the longest that judging may take: of what would take longer, less is judged, and that is said; None
            for any time.
        at_a_time: how many questions are open at once.
        seed: draws the samples.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    by: str | None = None
    answer_pattern: str | None = None
    max_new_tokens: int | None = None
    max_drop: float = MAX_DROP
    general: bool = True
    trace: str | None = None
    top_logprobs: int = TOP_LOGPROBS
    timeout: float = TIMEOUT_SECONDS
    minutes: float | None = None
    at_a_time: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_max_drop(self.max_drop)
        check_minutes(self.minutes)
        GenerationOptions(max_new_tokens=self.max_new_tokens, answer_pattern=self.answer_pattern)
        for name, value, least in (("--top-logprobs", self.top_logprobs, 0), ("at_a_time", self.at_a_time, 1)):
            if value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}.")
        if not self.timeout > 0:
            raise UsageError(f"--timeout must be above 0 seconds, not {self.timeout:g}.")


def evaluate_endpoints(
    endpoints: Mapping[str, str],
    data: ExampleOptions | DataOptions | Data,
    options: EndpointOptions | None = None,
    *,
    journal: Path | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Judge models by what they answer behind OpenAI-compatible servers.

    Every model answers every example greedily. An answer says whether it is right, whether it loops and whether it
    ends; up to where it parts from the dense model's, the most likely tokens say how far the models are apart.

    Args:
        endpoints: base addresses by the names that the result calls the models by. The one called ``dense``, else the
            first, is the reference.
        data: held-out examples: a file (of which at most 400 records are used), or options that say more.
        options: see :class:`EndpointOptions`.
        journal: file in which answers are kept for a later run, None for nowhere. It is for the caller to delete.
        progress: where to show progress.

    Returns:
        The evaluation; of each model it holds the verdict and what was forgotten.

    Raises:
        ShapeMoeError: when something is wrong; the message says what to do.
    """
    options = options or EndpointOptions()
    names = _in_order(endpoints, options)
    reading = as_example_options(data, HELD_OUT_SAMPLES)
    if options.by is not None:
        if reading.data.stratify not in {None, options.by}:
            raise UsageError("--by and --stratify name different fields; leave one of them out.")
        reading = replace(reading, data=replace(reading.data, stratify=options.by))
    seen = SeenPrompts.of_source(load_trace(options.trace).info.source) if options.trace is not None else None
    watched = WatchedFiles([*reading.data.files, options.trace])
    with ExitStack() as stack:
        servers = {name: stack.enter_context(OpenAIServer(endpoints[name], options.timeout)) for name in names}
        models = [_served(name, server, reading, options) for name, server in servers.items()]
        _refuse_one_model_twice(names, models)
        records = load_records(reading.data, progress)
        run = _Run(names, models, records, reading, options, seen, Journal(journal, "key", "answers"), progress)
        found = run.carry_out()
    watched.check()
    return found


def _in_order(endpoints: Mapping[str, str], options: EndpointOptions) -> list[str]:
    """The names, the reference first."""
    if len(endpoints) < 2:
        raise UsageError(
            "Give two endpoints at least, the dense model's and a pruned one's: --endpoint dense=URL --endpoint "
            "pruned=URL."
        )
    if unknown := sorted(set(options.models) - {"", *endpoints}):
        raise UsageError(f"--endpoint-model names {unknown[0]!r}, but the endpoints are {', '.join(endpoints)}.")
    first = DENSE if DENSE in endpoints else next(iter(endpoints))
    return [first, *(name for name in endpoints if name != first)]


def _served(name: str, server: OpenAIServer, reading: ExampleOptions, options: EndpointOptions) -> ServedModel:
    """The model of an endpoint; asking for its name shows whether the server is there."""
    model = server.model(options.models.get(name) or options.models.get(""))
    tokens = reading.tokens
    return ServedModel(server, model, options.top_logprobs, tokens.template, tokens.template_args)


def _refuse_one_model_twice(names: Sequence[str], models: Sequence[ServedModel]) -> None:
    asked: dict[tuple[str, str], str] = {}
    for name, model in zip(names, models, strict=True):
        other = asked.setdefault((model.server.base, model.model), name)
        if other != name:
            raise UsageError(
                f"{other} and {name} are the same model {model.model!r} at {model.server.base}: give two addresses, or "
                "two models of one server (--endpoint-model NAME=MODEL)."
            )


class _Run:
    """One evaluation on its way: every question goes to every server, and answers are compared as they come."""

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[ServedModel],
        records: Sequence[Record],
        reading: ExampleOptions,
        options: EndpointOptions,
        seen: SeenPrompts | None,
        journal: Journal[list[dict[str, Any]]],
        progress: Progress,
    ) -> None:
        self.names, self.models, self.reading, self.options = list(names), list(models), reading, options
        self.seen, self.journal, self.progress = seen, journal, progress
        questions = [(record, Asked.of(record)) for record in records]
        self.records = [record for record, one in questions if one is not None]
        self.asked = [one for _, one in questions if one is not None]
        self.notes: list[str] = []
        self.fresh: set[str] = set()
        if not self.asked:
            raise DataError(f"{reading.data.name} holds texts without prompts: there is nothing to ask a server.")
        if not reading.tokens.template and any(one.record.messages is not None for one in self.asked):
            raise DataError(f"{reading.data.name} holds conversations, which need the chat template: no --no-template.")
        if len(self.asked) < len(records):
            self.notes.append(f"{len(records) - len(self.asked)} texts without prompts were left out.")

    def carry_out(self) -> Evaluation:
        """Ask everything and judge."""
        options = self.options
        room = options.max_new_tokens or answer_room(self.asked)
        amounts = self._planned(room)
        answers = self._ask("Asking the servers", [one.record for one in self.asked], room)
        prompts = tool_check.tool_prompts(self.records, amounts.calls)
        offered = self._ask("Offering tools", [prompt.record for prompt in prompts], tool_check.ANSWER_TOKENS)
        general = forgotten.general_records() if amounts.general else []
        groups = [record.group for record in general]
        general = [general[i] for i in spread_over_classes(groups, range(len(general)), amounts.general)]
        answered = self._ask("General prompts", general, forgotten.ANSWER_TOKENS)
        models = [Evaluated(self.names[0], "endpoint", None, None)]
        for place, name in enumerate(self.names[1:], start=1):
            found = Evaluated(name, "endpoint", None, None)
            calls = {
                prompt.position: ToolExample(prompt.tools, prompt.reference, both[0].calls, both[place].calls)
                for prompt, both in zip(prompts, offered, strict=True)
            }
            found.verdict = self._verdict([both[0] for both in answers], [both[place] for both in answers], calls, room)
            if general:
                sides = [both[0] for both in answered], [both[place] for both in answered]
                kept = forgotten.kept_groups(self.seen) if self.seen is not None else ()
                found.forgotten = what_was_forgotten(general, *sides, kept=kept)
            models.append(found)
        return Evaluation(
            model=self.names[0],
            fingerprint=None,
            data=self.reading.data.name,
            also=None,
            examples=len(self.asked),
            by=options.by,
            models=tuple(models),
            faithfulness=(),
            notes=tuple(self.notes),
            made_with=MadeWith.now(options.seed),
        )

    def _planned(self, room: int) -> Amounts:
        """How much is asked, from the speed of the first answers; how long it takes is said."""
        groups = [record.group for record in self.records]
        first = spread_over_classes(groups, range(len(groups)), 2 * self.options.at_a_time)
        began = clock()
        made = self._ask("The first questions", [self.asked[i].record for i in first], room)
        took = clock() - began
        tokens = sum(len(answer.tokens) for answers in made for answer in answers)
        pace, length = took / max(tokens, 1), tokens / len(made)
        call = min(length, tool_check.ANSWER_TOKENS * len(self.models))
        short = forgotten.ANSWER_TOKENS * len(self.models)

        def seconds(asked: Amounts) -> float:
            later = max(asked.examples - len(first), 0)
            return pace * (later * length + asked.calls * call + asked.general * short)

        offering = sum(bool(tool_check.tools_of(record)) for record in self.records)
        general = len(forgotten.general_records()) if self.options.general else 0
        full = Amounts(len(self.records), 0, min(offering, FREE_ANSWERS), general)
        least = Amounts(LEAST.examples * len(set(groups)), 0, LEAST.calls, LEAST.general)
        limit = None if self.options.minutes is None else 60 * self.options.minutes
        amounts, left = amounts_within(full, least, limit, seconds)
        text = f"The servers will be asked for about {readable_duration(left)} more."
        if amounts != full:
            less = f"Judging everything would take about {readable_duration(seconds(full))}; to stay within "
            less += f"{self.options.minutes:g} min (--judge-minutes), only {joined(left_out(full, amounts))} are used."
            self.notes.append(less)
            text = f"{less} {text}"
            chosen = spread_over_classes(groups, range(len(groups)), amounts.examples)
            self.records, self.asked = [self.records[i] for i in chosen], [self.asked[i] for i in chosen]
        self.progress.note(text)
        return amounts

    def _verdict(
        self, dense: list[Compared], pruned: list[Compared], calls: dict[int, ToolExample], room: int
    ) -> Verdict:
        pattern = self.options.answer_pattern
        theirs, ours = (sums_of(self.asked, side, dense, pattern) for side in (dense, pruned))
        ids: dict[str, int] = {}
        made = (free_answers(dense, theirs.exact, room, ids), free_answers(pruned, ours.exact, room, ids))
        left_out = {i for i, record in enumerate(self.records) if self.seen is not None and record in self.seen}
        notes = [truncation(pruned, self.options.top_logprobs)]
        if self.seen is None:
            notes.append("Without its trace (--trace) it is not known whether calibration has seen these examples.")
        return conclude_over(
            [record.group for record in self.records],
            theirs,
            ours,
            made,
            answered=range(len(self.asked)),
            calls=calls or None,
            calling={i for i, record in enumerate(self.records) if tool_check.calls_tools(record)},
            left_out=left_out,
            max_drop=self.options.max_drop,
            notes=notes,
            measured=measured_tokens(pruned),
        )

    def _ask(self, what: str, records: Sequence[Record], room: int) -> list[list[Compared]]:
        """Answers of all models to each record, those of an earlier run included."""
        keys = [question_key(self.models, record, room) for record in records]
        open_ones = {key: record for key, record in zip(keys, records, strict=True) if key not in self.journal}
        if known := len(set(keys) - set(open_ones) - self.fresh):
            self.progress.note(
                f"{what}: {counted(known, 'answer')} of an interrupted run {'is' if known == 1 else 'are'} there."
            )
        self.fresh.update(open_ones)
        if open_ones:
            with (
                self.progress.phase(what, len(open_ones), "question") as advance,
                ThreadPoolExecutor(self.options.at_a_time) as pool,
            ):
                waiting = {pool.submit(ask_all, self.models, record, room): key for key, record in open_ones.items()}
                try:
                    for done in as_completed(waiting):
                        self.journal.put(waiting[done], [found.to_item() for found in done.result()])
                        advance(1)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
        return [[Compared.from_item(item) for item in self.journal[key]] for key in keys]
