"""What is left to the tool: which methods ``auto`` tries, by what it judges them, and what that may cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from shape_moe.architectures.moe_config import GateScale, MoeConfig
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import one_of
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.jobs.held_out import HELD_OUT_SAMPLES
from shape_moe.jobs.select import AUTO
from shape_moe.scoring.registry import get_scorer
from shape_moe.selection.method import ROUTINGS, Method, Routing, gate_scales
from shape_moe.selection.recommended import LAST, RAGGED, STOCK
from shape_moe.selection.rules import get_rule
from shape_moe.tracing.engine import every_statistic

Effort = Literal["fast", "default", "thorough"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
MOST_PASSES = 60.0
"""What choosing costs at most with effort ``default``, in forward passes of the calibration set, its trace included."""
AUTO_HELD_OUT = 64
"""Examples that candidates are judged by when nothing else is said."""
LEAST_HELD_OUT = 8
"""Fewer examples of a class tell no candidates apart."""
THOROUGH = (("easy-ep", "measured"), ("easy-ep", "uniform"), ("contribution", "global"), ("reap", "uniform"))
"""What effort ``thorough`` tries beside the usual candidates."""


def check_effort(name: str) -> Effort:
    """An effort by its name.

    Raises:
        UsageError: for an unknown name.
    """
    return one_of(name, EFFORTS, "Effort")


@dataclass(frozen=True)
class ChoiceOptions:
    """What is left to the tool.

    Attributes:
        limit: what may be lost; the keep rate is then the smallest that stays within. None keeps the rate asked for.
        rules: rules to try with scorer ``auto``, None for those that the benchmark found good.
        routings: routings to try, None for both with scorer ``auto`` and for the one asked for otherwise.
        held_out: examples to judge by, None for a share of the calibration data.
        held_out_samples: how many, None for 64, with a limit 400.
        generation: how candidates answer freely before one is chosen.
        effort: ``fast`` judges nothing and takes the method that the benchmark recommends; ``default`` costs at most
            :data:`MOST_PASSES` forward passes of the calibration set; ``thorough`` tries more candidates, with layer
            curves in both routings and on the whole grid.
        keeps_gate_scale: whether the gate scale that is asked for is the only one to try.
        insist: whether it is an error where candidates cannot be judged; else the recommended method is taken.
    """

    limit: Limit | None = None
    rules: tuple[str, ...] | None = None
    routings: tuple[Routing, ...] | None = None
    held_out: DataOptions | None = None
    held_out_samples: int | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    effort: Effort = "default"
    keeps_gate_scale: bool = False
    insist: bool = False

    def __post_init__(self) -> None:
        check_effort(self.effort)

    @property
    def samples(self) -> int:
        """How many examples to judge by."""
        if self.held_out_samples is not None:
            return self.held_out_samples
        return HELD_OUT_SAMPLES if self.limit else AUTO_HELD_OUT

    @property
    def passes(self) -> float | None:
        """What choosing may cost, in forward passes of the calibration set; None for anything."""
        return None if self.effort == "thorough" else MOST_PASSES


def pairs_to_try(*, equal_counts: bool, effort: Effort = "default") -> list[tuple[str, str]]:
    """Scorers and rules that ``auto`` tries, without any that a trace or a model rules out."""
    if equal_counts:
        return list(dict.fromkeys(pair for entry in STOCK for pair in entry.pairs))
    found = dict.fromkeys(pair for entry in RAGGED for pair in entry.pairs)
    return [*found, *(pair for pair in THOROUGH if effort == "thorough")]


def methods_to_try(
    asked: Method,
    options: ChoiceOptions,
    top_k: int,
    statistics: Collection[str] | None = None,
    moe: MoeConfig | None = None,
) -> list[Method]:
    """The methods that are tried; a limit tries none that goes by layer curves.

    Args:
        asked: what was asked for.
        options: what is left to choose.
        top_k: experts per token of the model.
        statistics: what the trace holds beside coalitions, None for all that are installed.
        moe: the model's routed experts, which say what gate scales there are; None for the one asked for.
    """
    automatic = asked.scorer == AUTO
    routings = options.routings or (ROUTINGS if automatic and not asked.equal_counts else (asked.routing,))
    pairs: Sequence[tuple[str, str]] = [(asked.scorer, asked.rule)]
    if automatic:
        held = {"coalitions", *(every_statistic() if statistics is None else statistics)}
        every = pairs_to_try(equal_counts=asked.equal_counts, effort=options.effort)
        known = ((pair, get_scorer(pair[0])) for pair in every)
        pairs = [pair for pair, scorer in known if set(scorer.needs) <= held and scorer.can_value(top_k)]
        if options.limit is not None:
            pairs = [pair for pair in pairs if not get_rule(pair[1]).by_curves]
        if options.rules is not None:
            named = dict.fromkeys(scorer for scorer, _ in pairs)
            pairs = [(scorer, rule) for scorer in named for rule in options.rules]
        pairs = pairs or [LAST]
    routed = [(routing, scale) for routing in routings for scale in _scales(asked, routing, options, moe)]
    return [
        replace(asked, scorer=scorer, rule=rule, routing=routing, gate_scale=scale)
        for scorer, rule in pairs
        for routing, scale in routed
    ]


def _scales(asked: Method, routing: Routing, options: ChoiceOptions, moe: MoeConfig | None) -> tuple[GateScale, ...]:
    """The gate scales to try with a routing, ``trained`` first."""
    if moe is None or asked.scorer != AUTO or options.keeps_gate_scale:
        return (asked.gate_scale if routing == "reroute" else "survivors",)
    return gate_scales(moe, routing, asked.target)
