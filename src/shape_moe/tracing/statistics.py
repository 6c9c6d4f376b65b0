"""The statistics that a trace may hold: names, axes, reductions and meanings.

``g`` is the gate weight that the experts module received, ``E_i`` the output of expert ``i`` before weighting,
``a_i = g_i E_i`` (times the family's residual scale) its contribution, ``y`` the sum of contributions, ``h`` the
residual stream before the norm that feeds the block. Every statistic is kept per segment, for tokens that are
prompt and tokens that are response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axes = Literal["expert", "layer", "pair"]
HALVES = 2
"""The Gram matrices are kept for this many halves of the examples: even and odd folds."""


@dataclass(frozen=True)
class Statistic:
    """One entry of a trace.

    Attributes:
        name: key in the file.
        axes: ``expert`` is [layer, segment, fold, expert]; ``layer`` is [layer, segment, fold]; ``pair`` is
            [layer, segment, half, expert, expert].
        reduction: how tokens, and later traces, are put together.
        meaning: what is summed (or maximised) over tokens.
    """

    name: str
    axes: Axes
    reduction: Literal["sum", "max"]
    meaning: str


STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic("tokens", "expert", "sum", "tokens routed to the expert"),
        Statistic("gate", "expert", "sum", "g"),
        Statistic("gate_renormalised", "expert", "sum", "g / sum of g over the top-k"),
        Statistic("norm", "expert", "sum", "|E_i|"),
        Statistic("gated_norm", "expert", "sum", "g |E_i|"),
        Statistic("gated_norm_renormalised", "expert", "sum", "g |E_i| / sum of g over the top-k"),
        Statistic("gated_norm_turned", "expert", "sum", "g |E_i| (1 - cos(h, h + y))"),
        Statistic("largest_norm", "expert", "max", "|E_i|"),
        Statistic("router_probability", "expert", "sum", "the router's probability of the expert, routed to or not"),
        Statistic("layer_tokens", "layer", "sum", "1"),
        Statistic("output_square", "layer", "sum", "|y|^2"),
        Statistic("residual_square", "layer", "sum", "|h|^2"),
        Statistic("gram", "pair", "sum", "<a_i, a_j>"),
        Statistic("gram_relative", "pair", "sum", "<a_i, a_j> / |h|^2"),
    )
}

SUMMED_PER_SLOT = (
    "tokens",
    "gate",
    "gate_renormalised",
    "norm",
    "gated_norm",
    "gated_norm_renormalised",
    "gated_norm_turned",
)
"""Per-expert sums with one term for every (token, expert) that was routed, in the recorder's column order."""

SUMMED_PER_TOKEN = ("layer_tokens", "output_square", "residual_square")
"""Per-layer sums with one term per token, in the recorder's column order."""
