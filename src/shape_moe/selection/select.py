"""From scores to a selection: the rule, the budget, the constraints, and what a user should know about the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.moe_config import RouterFacts, check_gate_scale
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import UsageError
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.selection import guards
from shape_moe.selection.budget import Constraints, Room, choose
from shape_moe.selection.layer_curves import LayerCurves, choose_by_curves
from shape_moe.selection.method import Method
from shape_moe.selection.near_ties import near_ties, priority_bounds, rounding_of
from shape_moe.selection.rules import Priority, bisection_budget, budget_for, get_rule, layer_ranks
from shape_moe.selection.selection import Selection, check_selection, layers_from_mask
from shape_moe.selection.stability import stability
from shape_moe.tracing.token_weights import SegmentWeights, TokenWeights
from shape_moe.tracing.trace import Trace


@dataclass(frozen=True)
class SelectOptions:
    """What is asked of a selection.

    Attributes:
        keep: keep rate in (0, 1].
        method: scorer, rule, routing and target.
        scoring: segment weights and seed.
        tolerance: reproduce the paper's bisection with this tolerance in keep rate (rule coverage).
        skip_layers: decoder layers that keep every expert.
        protect: expert ids by decoder layer that are kept in any case.
        multiple_of: every pruned layer keeps a multiple of this many experts.
        allow_rounding: take the nearest feasible budget below an infeasible one.
        curves: what each layer's cut costs, for rule ``measured``.

    Raises:
        UsageError: for a keep rate outside (0, 1], and a method or a tolerance that does not exist or fit.
    """

    keep: float
    method: Method = field(default_factory=Method)
    scoring: ScoreOptions = field(default_factory=ScoreOptions)
    tolerance: float | None = None
    skip_layers: tuple[int, ...] = ()
    protect: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    multiple_of: int = 1
    allow_rounding: bool = False
    curves: LayerCurves | None = None

    def __post_init__(self) -> None:
        self.method.check()
        budget_for(self.keep, 1)
        if self.tolerance is not None and (self.method.rule != "coverage" or not 0 < self.tolerance < 1):
            raise UsageError("A tolerance goes with the coverage rule and lies between 0 and 1.")

    def budget(self, priority: Priority) -> int:
        """How many experts to keep."""
        if self.tolerance is not None:
            return bisection_budget(priority, self.keep, self.tolerance)
        return budget_for(self.keep, priority.size)

    def constraints(self, layers: tuple[int, ...], facts: RouterFacts | None) -> Constraints:
        """The constraints on a model's layers.

        Args:
            layers: the model's MoE layers.
            facts: of its router; only rerouting has to know them.

        Raises:
            UsageError: for a layer that the model does not have.
        """
        unknown = (set(self.skip_layers) | set(self.protect)) - set(layers)
        if unknown:
            raise UsageError(f"Layer {min(unknown)} is not an MoE layer of this model.")
        facts = facts if self.method.routing == "reroute" else None
        return Constraints(
            skip_layers=frozenset(layers.index(layer) for layer in self.skip_layers),
            protect={layers.index(layer): tuple(ids) for layer, ids in self.protect.items()},
            floor=facts.floor if facts else 1,
            multiple_of=self.multiple_of,
            groups=facts.groups if facts else 1,
            equal=self.method.equal_counts,
            allow_rounding=self.allow_rounding,
        )


class _Picker:
    """Keeps experts as options say, by any scores over the layers of one model.

    Args:
        options: what is asked for.
        layers: the model's MoE layers.
        facts: of its router.
        most: experts that each layer keeps at most, where layer curves share them out; None for no further limit.
    """

    def __init__(
        self,
        options: SelectOptions,
        layers: tuple[int, ...],
        facts: RouterFacts | None,
        most: Sequence[int] | None = None,
    ) -> None:
        self.most = most
        self.options, self.rule = options, get_rule(options.method.rule)
        self.constraints = options.constraints(layers, facts)
        if self.rule.by_curves and options.curves is None:
            raise UsageError(
                f"Rule {self.rule.name} needs layer curves: make them with `shape-moe measure`, and give them by "
                "--curves."
            )

    def priority(self, scores: Scores) -> Priority:
        return self.rule(scores.values, scores.tiebreak)

    def keep(self, scores: Scores, budget: int, half: int | None = None) -> NDArray[np.bool_]:
        ranks = layer_ranks(scores.values, scores.tiebreak)
        if self.rule.by_curves and self.options.curves is not None:
            room = Room(len(scores.layers), scores.num_experts, self.constraints)
            return choose_by_curves(self.options.curves.costs(half), budget, room, ranks, self.most)
        return choose(self.priority(scores), budget, self.constraints, ranks=ranks)


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
                f"The trace holds {_counted(trace.info.tokens)}, and none of them count with {_as_flags(weights)}."
            )
        halves = [trace.half(half) for half in (0, 1)]
        self._halves = halves if all(half.sums("tokens", weights).any(axis=1).all() for half in halves) else []
        self._scores: dict[tuple[str, bool], tuple[Scores, list[Scores]]] = {}
        self._bounds: dict[tuple[str, str], tuple[Priority, Priority]] = {}

    def _scored(self, scorer: str, *, by_layer: bool) -> tuple[Scores, list[Scores]]:
        key = (scorer, by_layer or len(self.trace.info.classes) == 1)
        if key not in self._scores:
            options = replace(self.scoring, by_layer=by_layer)
            halves = self._halves if get_scorer(scorer).needs else []
            whole, *parts = (score_trace(trace, scorer, options) for trace in (self.trace, *halves))
            self._scores[key] = whole, parts
        return self._scores[key]

    def _classes(self, scores: Scores) -> dict[str, Any]:
        """What a selection says about the classes of the trace, nothing where it has but one."""
        names = self.trace.info.classes
        if len(names) == 1:
            return {}
        return {"classes": {"names": list(names), "joined": "maximum" if scores.joined else "pooled"}}

    def _near_ties(self, picker: _Picker, scores: Scores, mask: NDArray[np.bool_]) -> dict[int, list[int]]:
        key = (scores.scorer, picker.rule.name)
        if key not in self._bounds:
            rounding = rounding_of(self.trace.info.dtype) if get_scorer(scores.scorer).needs else 0.0
            rounding *= 2 if scores.joined else 1  # a share moves with its value and with the whole
            self._bounds[key] = priority_bounds(picker.rule, scores, rounding)
        tied = near_ties(picker.rule, scores, mask, picker.constraints, self._bounds[key])
        return {layer: ids for layer, ids in layers_from_mask(scores.layers, tied).items() if ids}

    def series(self, options: SelectOptions, keeps: Sequence[float]) -> list[Selection]:
        """Select experts at several keep rates, every kept set inside the next larger one.

        The largest is what :meth:`select` gives at its rate. By a priority all others are, too: a smaller budget keeps
        a beginning of the same order. Layer curves (rule ``measured``) would give a layer now and then more experts
        under a smaller budget; here it keeps at most as many as under the larger one, and the rest is again the
        cheapest way.

        Args:
            options: what is asked for; its keep rate is overruled.
            keeps: the keep rates.

        Returns:
            One selection for every rate, largest first.

        Raises:
            BudgetError: when a budget cannot be met under the constraints.
            UsageError: for a tolerance, and as :meth:`select`.
        """
        check_series(options, keeps)
        found: list[Selection] = []
        for keep in sorted(keeps, reverse=True):
            found.append(self.select(replace(options, keep=keep), within=found[-1] if found else None))
        return found

    def select(self, options: SelectOptions, *, within: Selection | None = None) -> Selection:
        """Select experts.

        Args:
            options: what is asked for; scores are weighted as this selector's are.
            within: a selection by the same method at a larger keep rate, outside which nothing may be kept.

        Raises:
            BudgetError: when the budget cannot be met under the constraints.
            UsageError: for options that contradict each other, the trace or the model.
        """
        info, weights = self.trace.info, self.scoring.weights
        scale = options.method.gate_scale
        check_gate_scale(scale, FAMILIES.get(info.family or ""), info.routing.renormalises)
        weights = get_scorer(options.method.scorer).weights_for(self.trace, weights)
        most = [len(ids) for ids in within.layers.values()] if within is not None else None
        picker = _Picker(options, info.layers, info.routing, most)
        curves = options.curves if picker.rule.by_curves else None
        if curves is not None:
            curves.check(info, options.method, {**weights.flags, "seed": self.scoring.seed})
        scores, halves = self._scored(options.method.scorer, by_layer=picker.rule.by_layer)
        selection, mask, budget = _selection(picker, scores, info.routing.top_k)
        if curves is not None and not (curves.has_half(0) and curves.has_half(1)):
            halves = []
        kept = [picker.keep(part, budget, half) for half, part in enumerate(halves)]
        agreement = stability(*kept) if kept else None
        warnings = guards.warn_unseen(self._tokens)
        if "largest_norm" in self.trace.statistics:
            largest = self.trace.sums("largest_norm", weights)
            warnings += guards.warn_lost_super_experts(info.layers, largest, mask)
        warnings += guards.warn_unstable(agreement)
        warnings += map(str, info.source.get("remarks") or ())
        warnings += guards.warn_inflation(options.method, info.routing.renormalises)
        return replace(
            selection,
            constraints={**selection.constraints, **self._classes(scores), **_predicted(curves, mask)},
            fingerprint=info.fingerprint,
            model=info.model,
            family=info.family,
            stability=agreement,
            near_ties=self._near_ties(picker, scores, mask),
            options={**weights.flags, "seed": self.scoring.seed},
            warnings=tuple(warnings),
            seen=SeenPrompts.of_source(info.source).and_of(curves.seen if curves is not None else None).by_salt(),
            routers=info.routers,
        )


def check_series(options: SelectOptions, keeps: Sequence[float]) -> None:
    """Refuse keep rates that make no series.

    Raises:
        UsageError: for fewer than two, one that is given twice, and a tolerance, which meets budgets in no order.
    """
    for keep in keeps:
        budget_for(keep, 1)
    if len(keeps) < 2:
        raise UsageError("A series has two keep rates or more, such as 0.85,0.75,0.6.")
    if twice := [keep for place, keep in enumerate(keeps) if keep in keeps[:place]]:
        raise UsageError(f"The keep rate {twice[0]:g} is given twice; leave one out.")
    if options.tolerance is not None:
        raise UsageError("--tolerance reproduces one published selection; leave it out where several are made.")


def select_from_trace(trace: Trace, options: SelectOptions) -> Selection:
    """Score a trace and select experts.

    Args:
        trace: the trace.
        options: what is asked for.

    Raises:
        BudgetError: when the budget cannot be met under the constraints.
        UsageError: for options that contradict each other, the trace or the model, and when the segments that count
            hold no tokens.
    """
    return TraceSelector(trace, options.scoring).select(options)


def select_from_scores(scores: Scores, options: SelectOptions, *, routing: RouterFacts | None = None) -> Selection:
    """Select experts by a table of values; what only a trace knows (stability, norms) stays empty.

    Args:
        scores: the values; the method's scorer does not enter.
        options: what is asked for.
        routing: facts about the model's router, needed to reroute.

    Raises:
        BudgetError: when the budget cannot be met under the constraints.
        UsageError: for options that contradict each other or the table, and for routing reroute without ``routing``.
    """
    if options.method.routing == "reroute" and routing is None:
        raise UsageError(
            "A table of values does not say how many experts serve a token, which routing reroute must know: "
            "give --top-k."
        )
    if get_rule(options.method.rule).by_curves:
        raise UsageError("Rule measured goes by layer curves, which belong to a trace: select from that.")
    selection, *_ = _selection(_Picker(options, scores.layers, routing), scores, routing.top_k if routing else None)
    return replace(selection, warnings=tuple(guards.warn_unseen(scores.activations)))


def _predicted(curves: LayerCurves | None, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What the layers' cuts are predicted to cost, where that was measured."""
    if curves is None:
        return {}
    by_class = curves.predicted(mask.sum(axis=1))
    return {"measured": {"tokens": float(np.sum(curves.tokens)), "predicted_kl": by_class}}


def _as_flags(weights: TokenWeights | None) -> str:
    given = (weights or SegmentWeights()).flags
    return " and ".join(f"--{name}-weight {weight:g}" for name, weight in given.items())


def _counted(tokens: Mapping[str, float]) -> str:
    return " and ".join(f"{count:,.0f} {segment} tokens" for segment, count in tokens.items())


def check_feasible(options: SelectOptions, layers: tuple[int, ...], experts: int, routing: RouterFacts) -> None:
    """Check that a budget can be met, before anything is traced.

    Raises:
        BudgetError: when it cannot be met under the constraints.
        UsageError: for options that contradict each other or the model.
    """
    room = Room(len(layers), experts, options.constraints(layers, routing))
    if options.tolerance is None:  # else the budget depends on the scores
        room.feasible(budget_for(options.keep, len(layers) * experts))


def _selection(picker: _Picker, scores: Scores, top_k: int | None) -> tuple[Selection, NDArray[np.bool_], int]:
    """The selection by scores, its mask, and the budget that was asked for."""
    options, priority = picker.options, picker.priority(scores)
    budget = options.budget(priority)
    mask = picker.keep(scores, budget)
    mass = np.maximum(scores.values, 0)
    kept_mass, layer_mass = (mass * mask).sum(axis=1), mass.sum(axis=1)
    shares = [float(kept / whole) if whole > 0 else None for kept, whole in zip(kept_mass, layer_mass, strict=True)]
    selection = Selection(
        fingerprint=None,
        model=None,
        family=None,
        scorer=scores.scorer,
        rule=options.method.rule,
        routing=options.method.routing,
        gate_scale=options.method.gate_scale,
        num_experts=scores.num_experts,
        top_k=top_k,
        layers=layers_from_mask(scores.layers, mask),
        keep_asked=options.keep,
        alpha=reached_alpha(priority, mask) if options.method.rule == "coverage" else None,
        constraints={
            "target": options.method.target,
            "tolerance": options.tolerance,
            "skip_layers": list(options.skip_layers),
            "protect": {str(layer): list(ids) for layer, ids in options.protect.items()},
            "multiple_of": options.multiple_of,
            "budget_asked": budget,
        },
        mass_kept=dict(zip(scores.layers, shares, strict=True)),
    )
    check_selection(selection)
    return selection, mask, budget


def reached_alpha(priority: Priority, mask: NDArray[np.bool_]) -> float | None:
    """The smallest dropped priority, when keeping everything below it gives this very selection, else None."""
    if mask.all():
        return None
    alpha = float(priority[~mask].min())
    return alpha if bool((priority[mask] < alpha).all()) else None
