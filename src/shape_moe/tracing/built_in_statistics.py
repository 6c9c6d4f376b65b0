"""The statistics that this package records, as functions of what one call of the experts shows.

``g`` is the gate weight that the experts module received, ``E_i`` the output of expert ``i`` before weighting,
``a_i = g_i E_i`` (times the family's residual scale) its contribution, ``y`` the sum of contributions, ``h`` the
residual stream before the norm that feeds the block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shape_moe.tracing.replacement import output_change
from shape_moe.tracing.statistics import statistic

if TYPE_CHECKING:
    import torch

    from shape_moe.tracing.observed import Observed


@statistic("tokens", per="slot", meaning="tokens routed to the expert", whole=True)
def tokens(seen: Observed) -> torch.Tensor:
    """One for every slot."""
    return seen.one_per_slot


@statistic("gate", per="slot", meaning="g")
def gate(seen: Observed) -> torch.Tensor:
    """The gate weight as received."""
    return seen.g


@statistic("gate_renormalised", per="slot", meaning="g / sum of g over the top-k")
def gate_renormalised(seen: Observed) -> torch.Tensor:
    """The gate weight's share of the token's."""
    return seen.g_renormalised


@statistic("norm", per="slot", meaning="|E_i|")
def norm(seen: Observed) -> torch.Tensor:
    """The output's norm."""
    return seen.norms


@statistic("gated_norm", per="slot", meaning="g |E_i|")
def gated_norm(seen: Observed) -> torch.Tensor:
    """The norm times the gate weight as received."""
    return seen.g * seen.norms


@statistic("gated_norm_renormalised", per="slot", meaning="g |E_i| / sum of g over the top-k")
def gated_norm_renormalised(seen: Observed) -> torch.Tensor:
    """The norm times the gate weight's share."""
    return seen.g_renormalised * seen.norms


@statistic("gated_norm_turned", per="slot", meaning="g |E_i| (1 - cos(h, h + y))")
def gated_norm_turned(seen: Observed) -> torch.Tensor:
    """The gated norm times the turn that all routed experts together give the residual stream."""
    return seen.g * seen.norms * seen.turned[:, None]


@statistic("contribution", per="slot", meaning="<a_i, y>")
def contribution(seen: Observed) -> torch.Tensor:
    """Inner product of a contribution and the routed output."""
    return seen.contribution_products.sum(2)


@statistic("contribution_relative", per="slot", meaning="<a_i, y> / |h|^2")
def contribution_relative(seen: Observed) -> torch.Tensor:
    """The same relative to the residual stream; 0 where that is 0."""
    return seen.contribution_products.sum(2) * seen.residual_square_inverse[:, None]


@statistic(
    "replacement",
    per="slot",
    meaning="|sum_B g' E - y|^2 / |h|^2, B = A without i, with the next choice",
    next_choice=True,
)
def replacement(seen: Observed) -> torch.Tensor:
    """What becomes of the routed output when the router takes its next choice; see tracing/replacement.py."""
    return output_change(seen, "survivors")


@statistic(
    "replacement_trained",
    per="slot",
    meaning="the same with gate weights of the size that the model was trained with",
    next_choice=True,
    gate_scale=True,
)
def replacement_trained(seen: Observed) -> torch.Tensor:
    """The same, where weights do not grow by what was removed."""
    return output_change(seen, "trained")


@statistic("largest_norm", per="slot", reduction="max", meaning="|E_i|")
def largest_norm(seen: Observed) -> torch.Tensor:
    """The output's norm, of which the largest is kept."""
    return seen.norms


@statistic("router_probability", per="expert", meaning="the router's probability of the expert, routed to or not")
def router_probability(seen: Observed) -> torch.Tensor:
    """Softmax or sigmoid of the router's logits, as the family has it."""
    return seen.router_probability


@statistic("layer_tokens", per="token", meaning="1", whole=True)
def layer_tokens(seen: Observed) -> torch.Tensor:
    """One for every token."""
    return seen.one_per_token


@statistic("output_square", per="token", meaning="|y|^2")
def output_square(seen: Observed) -> torch.Tensor:
    """Squared norm of the routed output."""
    return seen.output_square


@statistic("residual_square", per="token", meaning="|h|^2")
def residual_square(seen: Observed) -> torch.Tensor:
    """Squared norm of the residual stream."""
    return seen.residual_square


@statistic("gram_relative", per="pair", meaning="<a_i, a_j> / |h|^2")
def gram_relative(seen: Observed) -> torch.Tensor:
    """Inner products of contributions, relative to the residual stream; 0 where that is 0."""
    return seen.contribution_products * seen.residual_square_inverse[:, None, None]
