"""How a given selection was made, and what other scorers would keep at its size and under its constraints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.scoring.registry import ScoreOptions, scorers
from shape_moe.scoring.scores import Scores
from shape_moe.selection.rules import rules as known_rules
from shape_moe.selection.select import SelectOptions, select_from_scores
from shape_moe.selection.selection import Selection
from shape_moe.tracing.token_weights import token_weights


def scoring_of(selection: Selection | None) -> ScoreOptions:
    """How a selection was scored: weights, seed, and what became of classes; defaults where it does not say.

    Where the selection's scorer had its own weights, every other scorer has its own too.
    """
    if selection is None:
        return ScoreOptions()
    options, rule = selection.options, known_rules().get(selection.rule)
    weights, own = token_weights(options), scorers(converted=True).get(selection.scorer)
    return ScoreOptions(
        None if own is not None and own.weights == weights else weights,
        int(options.get("seed", 0)),
        pool_classes=selection.pooled,
        by_layer=rule is None or rule.by_layer,
    )


def options_of(selection: Selection) -> SelectOptions | None:
    """The options that a selection was made with, None where its rule is not one of this package.

    Budgets that had to be rounded may be rounded again. The paper's bisection is left out: its budget depends on the
    scorer, and scorers are compared at one size.
    """
    rules = selection.constraints
    if selection.rule not in known_rules():
        return None
    return SelectOptions(
        keep=selection.keep,
        method=selection.method,
        skip_layers=tuple(rules.get("skip_layers") or ()),
        protect={int(layer): tuple(ids) for layer, ids in (rules.get("protect") or {}).items()},
        multiple_of=int(rules.get("multiple_of") or 1),
        allow_rounding=True,
    )


def kept_by_scorer(
    scores: Sequence[Scores], selection: Selection, routing: RouterFacts | None
) -> dict[str, NDArray[np.bool_]]:
    """What each of several scorers keeps as the selection does: same size, rule, routing and constraints.

    Args:
        scores: values by different scorers.
        selection: whose options are taken.
        routing: facts about the model's routing.

    Returns:
        bool [L, E] by scorer; empty where the selection's rule is unknown.
    """
    options = options_of(selection)
    if options is None:
        return {}
    return {entry.scorer: select_from_scores(entry, options, routing=routing).mask() for entry in scores}
