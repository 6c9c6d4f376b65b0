"""From scores to a selection: the rule, the budget, the constraints, and what a user should know about the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.moe_config import RoutingFacts
from shape_moe.errors import UsageError
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.selection import guards
from shape_moe.selection.budget import Constraints, choose
from shape_moe.selection.rules import Priority, bisection_budget, budget_for, get_rule, layer_ranks
from shape_moe.selection.selection import Routing, Selection, check_selection, layers_from_mask
from shape_moe.selection.stability import stability
from shape_moe.tracing.trace import Trace


@dataclass(frozen=True)
class SelectOptions:
    """What is asked of a selection.

    Attributes:
        keep: keep rate in (0, 1].
        rule: ``coverage``, ``uniform`` or ``global``.
        routing: ``drop`` or ``reroute``.
        target: ``ragged`` or ``stock`` (equal counts in every layer, rerouted).
        tolerance: reproduce the paper's bisection with this tolerance in keep rate (rule coverage).
        skip_layers: decoder layers that keep every expert.
        protect: expert ids by decoder layer that are kept in any case.
        multiple_of: every pruned layer keeps a multiple of this many experts.
        allow_rounding: take the nearest feasible budget below an infeasible one.
    """

    keep: float
    rule: str = "coverage"
    routing: Routing = "drop"
    target: str = "ragged"
    tolerance: float | None = None
    skip_layers: tuple[int, ...] = ()
    protect: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    multiple_of: int = 1
    allow_rounding: bool = False

    def __post_init__(self) -> None:
        get_rule(self.rule)
        budget_for(self.keep, 1)
        if self.target not in ("ragged", "stock"):
            raise UsageError(f"Target must be ragged or stock, not {self.target!r}.")
        if self.target == "stock" and self.routing != "reroute":
            raise UsageError("Target stock needs routing reroute: a stock model knows no dropped slots.")
        if self.tolerance is not None and (self.rule != "coverage" or not 0 < self.tolerance < 1):
            raise UsageError("A tolerance goes with the coverage rule and lies between 0 and 1.")


@dataclass(frozen=True)
class _Choice:
    mask: NDArray[np.bool_]
    priority: Priority
    asked: int


class _Chooser(Protocol):
    def __call__(self, scores: Scores, budget: int | None = None) -> _Choice:
        """Choose by scores; ``budget`` overrules what the options ask for."""


class TraceSelector:
    """Selects from one trace many times: by several scorers and rules, at several keep rates.

    What does not depend on the keep rate is computed once: the scores of every scorer, and those of the two halves.

    Args:
        trace: the trace.
        scoring: segment weights and seed.

    Raises:
        UsageError: when the segments that count hold no tokens.
    """

    def __init__(self, trace: Trace, scoring: ScoreOptions | None = None) -> None:
        self.trace, self.scoring = trace, scoring or ScoreOptions()
        weights = self.scoring.weights
        self._tokens = trace.sums("tokens", weights)
        if not self._tokens.any():
            raise UsageError(
                f"The trace holds {_counted(trace.info.tokens)}, and none of them count with --prompt-weight "
                f"{weights.prompt:g} and --response-weight {weights.response:g}."
            )
        halves = [trace.half(half) for half in (0, 1)]
        self._halves = halves if all(half.sums("tokens", weights).any(axis=1).all() for half in halves) else []
        self._scores: dict[str, tuple[Scores, list[Scores]]] = {}

    def _scored(self, scorer: str) -> tuple[Scores, list[Scores]]:
        if scorer not in self._scores:
            whole = score_trace(self.trace, scorer, self.scoring)
            halves = self._halves if get_scorer(scorer).needs else []
            self._scores[scorer] = whole, [score_trace(half, scorer, self.scoring) for half in halves]
        return self._scores[scorer]

    def select(self, options: SelectOptions, scorer: str = "shape") -> Selection:
        """Select experts.

        Args:
            options: what is asked for.
            scorer: name of the scorer.

        Raises:
            BudgetError: when the budget cannot be met under the constraints.
            UsageError: for options that contradict each other, the trace or the model.
        """
        info, weights = self.trace.info, self.scoring.weights
        scores, halves = self._scored(scorer)
        pick = _chooser(options, info.layers, info.routing)
        choice = pick(scores)
        agreement = stability(*(pick(half, choice.asked).mask for half in halves)) if halves else None
        warnings = guards.warn_unseen(self._tokens)
        if "largest_norm" in self.trace.statistics:
            largest = self.trace.sums("largest_norm", weights)
            warnings += guards.warn_lost_super_experts(info.layers, largest, choice.mask)
        warnings += guards.warn_unstable(agreement)
        warnings += guards.warn_inflation(options.routing, info.routing.renormalises)
        return replace(
            _selection(scores, choice, options, info.routing.top_k),
            fingerprint=info.fingerprint,
            model=info.model,
            family=info.family,
            stability=agreement,
            options={"prompt": weights.prompt, "response": weights.response, "seed": self.scoring.seed},
            warnings=tuple(warnings),
        )


def select_from_trace(
    trace: Trace, options: SelectOptions, *, scorer: str = "shape", scoring: ScoreOptions | None = None
) -> Selection:
    """Score a trace and select experts.

    Args:
        trace: the trace.
        options: what is asked for.
        scorer: name of the scorer.
        scoring: segment weights and seed.

    Raises:
        BudgetError: when the budget cannot be met under the constraints.
        UsageError: for options that contradict each other, the trace or the model, and when the segments that count
            hold no tokens.
    """
    return TraceSelector(trace, scoring).select(options, scorer)


def select_from_scores(scores: Scores, options: SelectOptions, *, routing: RoutingFacts | None = None) -> Selection:
    """Select experts by a table of values; what only a trace knows (stability, norms) stays empty.

    Args:
        scores: the values.
        options: what is asked for.
        routing: facts about the model's routing, needed to reroute.

    Raises:
        BudgetError: when the budget cannot be met under the constraints.
        UsageError: for options that contradict each other or the table, and for routing reroute without ``routing``.
    """
    if options.routing == "reroute" and routing is None:
        raise UsageError(
            "A table of values does not say how many experts serve a token, which routing reroute must know: "
            "give --top-k."
        )
    choice = _chooser(options, scores.layers, routing)(scores)
    selection = _selection(scores, choice, options, routing.top_k if routing else None)
    return replace(selection, warnings=tuple(guards.warn_unseen(scores.activations)))


def _counted(tokens: Mapping[str, float]) -> str:
    return " and ".join(f"{count:,.0f} {segment} tokens" for segment, count in tokens.items())


def check_feasible(options: SelectOptions, layers: tuple[int, ...], experts: int, routing: RoutingFacts) -> None:
    """Check that a budget can be met, before anything is traced.

    Raises:
        BudgetError: when it cannot be met under the constraints.
        UsageError: for options that contradict each other or the model.
    """
    if options.tolerance is None:
        _chooser(options, layers, routing)(Scores("none", layers, *2 * [np.zeros((len(layers), experts))]))


def _chooser(options: SelectOptions, layers: tuple[int, ...], routing: RoutingFacts | None) -> _Chooser:
    row_of = {layer: row for row, layer in enumerate(layers)}
    unknown = (set(options.skip_layers) | set(options.protect)) - set(layers)
    if unknown:
        raise UsageError(f"Layer {min(unknown)} is not an MoE layer of this model.")
    facts = routing if routing and options.routing == "reroute" else None
    constraints = Constraints(
        skip_layers=frozenset(row_of[layer] for layer in options.skip_layers),
        protect={row_of[layer]: tuple(ids) for layer, ids in options.protect.items()},
        floor=facts.floor if facts else 1,
        multiple_of=options.multiple_of,
        groups=facts.groups if facts else 1,
        equal=options.target == "stock",
        allow_rounding=options.allow_rounding,
    )

    def pick(scores: Scores, budget: int | None = None) -> _Choice:
        priority = get_rule(options.rule)(scores.values, scores.activations)
        if budget is None and options.tolerance is not None:
            budget = bisection_budget(priority, options.keep, options.tolerance)
        elif budget is None:
            budget = budget_for(options.keep, priority.size)
        ranks = layer_ranks(scores.values, scores.activations)
        return _Choice(choose(priority, budget, constraints, ranks=ranks), priority, budget)

    return pick


def _selection(scores: Scores, choice: _Choice, options: SelectOptions, top_k: int | None) -> Selection:
    mass = np.maximum(scores.values, 0)
    kept_mass, layer_mass = (mass * choice.mask).sum(axis=1), mass.sum(axis=1)
    shares = [float(kept / whole) if whole > 0 else None for kept, whole in zip(kept_mass, layer_mass, strict=True)]
    constraints = {
        "target": options.target,
        "tolerance": options.tolerance,
        "skip_layers": list(options.skip_layers),
        "protect": {str(layer): list(ids) for layer, ids in options.protect.items()},
        "multiple_of": options.multiple_of,
        "budget_asked": choice.asked,
    }
    selection = Selection(
        fingerprint=None,
        model=None,
        family=None,
        scorer=scores.scorer,
        rule=options.rule,
        routing=options.routing,
        num_experts=scores.num_experts,
        top_k=top_k,
        layers=layers_from_mask(scores.layers, choice.mask),
        keep_asked=options.keep,
        alpha=reached_alpha(choice.priority, choice.mask) if options.rule == "coverage" else None,
        constraints=constraints,
        mass_kept=dict(zip(scores.layers, shares, strict=True)),
    )
    check_selection(selection)
    return selection


def reached_alpha(priority: Priority, mask: NDArray[np.bool_]) -> float | None:
    """The smallest dropped priority, when keeping everything below it gives this very selection, else None."""
    if mask.all():
        return None
    alpha = float(priority[~mask].min())
    return alpha if bool((priority[mask] < alpha).all()) else None
