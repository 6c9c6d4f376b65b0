"""What other scorers would keep at the size and under the constraints of a given selection."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.moe_config import RoutingFacts
from shape_moe.scoring.scores import Scores
from shape_moe.selection.rules import RULES
from shape_moe.selection.select import SelectOptions, select_from_scores
from shape_moe.selection.selection import Selection


def options_of(selection: Selection) -> SelectOptions | None:
    """The options that a selection was made with, None where its rule is not one of this package.

    Budgets that had to be rounded may be rounded again. The paper's bisection is left out: its budget depends on the
    scorer, and scorers are compared at one size.
    """
    rules = selection.constraints
    if selection.rule not in RULES:
        return None
    return SelectOptions(
        keep=selection.keep,
        rule=selection.rule,
        routing=selection.routing,
        target=str(rules.get("target", "ragged")),
        skip_layers=tuple(rules.get("skip_layers") or ()),
        protect={int(layer): tuple(ids) for layer, ids in (rules.get("protect") or {}).items()},
        multiple_of=int(rules.get("multiple_of") or 1),
        allow_rounding=True,
    )


def kept_by_scorer(
    scores: Sequence[Scores], selection: Selection, routing: RoutingFacts | None
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
