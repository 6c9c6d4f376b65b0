"""What can be asked of a pruned checkpoint, and which requests name too little or too much."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from os import PathLike

from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.sources import Data
from shape_moe.errors import UsageError
from shape_moe.jobs.choice import ChoiceOptions
from shape_moe.jobs.judgement import (
    JudgementOptions,
)
from shape_moe.jobs.refit import check_refit
from shape_moe.jobs.select import AUTO
from shape_moe.jobs.session import DEFAULT_SAMPLES, ExampleOptions, as_example_options
from shape_moe.scoring.registry import get_scorer
from shape_moe.selection.method import PUBLISHED_SAMPLES, Method
from shape_moe.selection.recommended import fixed_method
from shape_moe.selection.rules import check_by_priority, get_rule
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import Selection

PAPER_SAMPLES = PUBLISHED_SAMPLES
"""Calibration examples of the published experiments."""
_LIMIT_KEEP = 0.5
"""A limit looks for the keep rate with the method that is recommended from here on."""


@dataclass(frozen=True)
class PruneOptions:
    """What is asked of a pruned checkpoint.

    Attributes:
        select: how experts are chosen; None when a finished selection is given.
        trace: the calibration set and how to trace; None when a trace or a selection is given. Its device, dtype
            and stream are overruled by those below.
        device: where to trace and to compare logits.
        dtype: in which dtype.
        trust_remote_code: run the code that comes with the original instead of Transformers' own, where there is some.
        stream: trace and judge layer by layer (True), or with the whole model in memory (False); None decides by free
            memory.
        choice: how candidates are judged where scorer or keep rate are left to the tool, None for as usual where the
            scorer is ``auto``, and for not at all where another is named.
        judgement: how the pruned model is judged, None for not at all.
        refit: repair the kept experts' down projections by least squares: ``on`` always, ``auto`` where examples that
            neither calibrate nor report show a gain, ``off`` never.
        imatrix: an imatrix of the original, of which the pruned model's is made and lies with it; None for none.
        check_logits: compare the pruned model's logits with the masked original's, where both fit in memory.
        force: replace an existing result, accept artifacts of unknown origin.
    """

    select: SelectOptions | None = None
    trace: ExampleOptions | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    stream: bool | None = None
    choice: ChoiceOptions | None = None
    judgement: JudgementOptions | None = field(default_factory=JudgementOptions)
    refit: str = "off"
    imatrix: str | PathLike[str] | None = None
    check_logits: bool = True
    force: bool = False


def complete_options(
    options: PruneOptions, data: ExampleOptions | DataOptions | Data | None, keep: float | None, *, gguf: bool
) -> PruneOptions:
    """The options, with what the short forms (``data``, ``keep``) say in their places, and what is usual elsewhere.

    That is scorer ``auto``, for equal counts where a GGUF file is pruned (llama.cpp loads nothing else).
    """
    usual = Method(AUTO, routing="reroute", target="stock") if gguf else Method(AUTO)
    if keep is not None:
        options = replace(options, select=SelectOptions(keep, usual, allow_rounding=gguf))
    choice = options.choice
    if options.select is None and choice is not None and choice.limit is not None:
        options = replace(options, select=SelectOptions(1.0, fixed_method(usual, _LIMIT_KEEP), allow_rounding=gguf))
    if choice is None and options.select is not None and options.select.method.scorer == AUTO:
        options = replace(options, choice=ChoiceOptions())
    if data is not None:
        samples = DEFAULT_SAMPLES if options.choice else PAPER_SAMPLES
        options = replace(options, trace=as_example_options(data, samples))
    if options.trace is not None:
        options = replace(
            options, trace=replace(options.trace, device=options.device, dtype=options.dtype, stream=options.stream)
        )
    return options


def without_choice(
    options: PruneOptions, statistics: Collection[str] | None = None, top_k: int | None = None
) -> PruneOptions:
    """The options with the method that is recommended where candidates cannot, or shall not, be judged.

    Args:
        options: the options.
        statistics: what a finished trace holds beside coalitions, None for everything.
        top_k: experts per token of the model, None for enough.
    """

    def can_use(name: str) -> bool:
        scorer = get_scorer(name)
        held = statistics is None or set(scorer.needs) <= {"coalitions", *statistics}
        return held and (top_k is None or scorer.can_value(top_k))

    asked, choice = options.select, options.choice
    assert asked is not None
    method = asked.method
    if method.scorer == AUTO:
        if choice is not None and choice.routings:
            method = replace(method, routing=choice.routings[0])
        method = fixed_method(method, asked.keep, can_use)
        if choice is not None and choice.rules:
            method = replace(method, rule=choice.rules[0])
    return replace(options, choice=None, select=replace(asked, method=method, tolerance=None))


def check_request(
    options: PruneOptions, trace: str | PathLike[str] | None, selection: str | PathLike[str] | Selection | None
) -> None:
    """Refuse requests that name too little or too much.

    Raises:
        UsageError: saying what to give.
    """
    if trace is not None and selection is not None:
        raise UsageError("--trace and --selection exclude each other; give one of them.")
    if options.choice is not None:
        if selection is not None or (options.trace is None and trace is None):
            raise UsageError("Scorer auto and limits choose on held-out examples: give data (--data) or a trace.")
        named = [options.select.method.rule] if options.select is not None else []
        for rule in (*(options.choice.rules or ()), *named) if options.choice.limit is not None else ():
            check_by_priority(rule)
    elif options.trace is None and trace is None and selection is None:
        raise UsageError("Give calibration data (--data), a trace (--trace) or a selection (--selection).")
    elif options.trace is not None and options.judgement is None and (trace is not None or selection is not None):
        raise UsageError("Beside a trace or a selection, data (--data) only judge: leave them out without judgement.")
    check_refit(options.refit)
    if options.refit == "on" and (trace is not None or selection is not None):
        raise UsageError(
            "--refit on runs the calibration examples through the model once more: start from them (--data), without "
            "--trace and --selection, or leave it out."
        )
    asked = options.select
    if asked is not None and makes_curves(asked) and options.trace is None:
        raise UsageError(
            f"Rule {asked.method.rule} needs layer curves: make them with `shape-moe measure` and give them by "
            "--curves, or start from --data, whose examples are then measured."
        )
    if (options.select is None) != (selection is not None):
        raise UsageError("Give a keep rate (--keep or --fit) with data or a trace, and none with a selection.")


def makes_curves(asked: SelectOptions) -> bool:
    """Whether layers have to be measured before a budget can be shared out."""
    return get_rule(asked.method.rule).by_curves and asked.curves is None
