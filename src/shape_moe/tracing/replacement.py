r"""What becomes of a layer's routed output when one expert is gone and the router takes its next choice.

For a token with coalition ``A``, ``n`` is the router's own (k+1)-th choice. Without expert ``i`` of ``A`` the router
serves the token by ``B = A \ {i} + {n}``, with weights ``g'``; the routed output moves by ``sum_B g'_j E_j - y``. Its
square is ``c' P c`` with ``c_j = g'_j - g_j``, ``c_i = -g_i``, ``c_n = g'_n`` and P the (k+1) x (k+1) inner products of
the experts' outputs.

Where routing is limited to groups, those that the token has chosen are held fixed: ``n`` is the best unused expert in
them. In truth the removal of an expert may cost its group the choice; see docs/method.md for how far that is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from shape_moe.architectures.moe_config import GateScale
    from shape_moe.tracing.observed import Observed


@dataclass(frozen=True)
class WiderChoice:
    """What a router answers when it is asked for one expert more than serve a token.

    Attributes:
        ids: int [T, k + 1].
        weights: as the router gives them [T, k + 1].
    """

    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class NextChoice:
    """The experts that tokens would go to next.

    Attributes:
        outputs: ``E_n`` before weighting [T, H], in the model's dtype and on its device.
        weights: float64 [T], the router's weight of ``n``, on the scale of the ``g`` that the experts module received.
    """

    outputs: torch.Tensor
    weights: torch.Tensor


def wider_choice(router: nn.Module, attribute: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> WiderChoice:
    """Ask a router for one expert more than usual, and leave it as it was.

    Args:
        router: the live router.
        attribute: its attribute that says how many experts it chooses.
        args: what its forward was called with.
        kwargs: the same by name.
    """
    top_k = getattr(router, attribute)
    setattr(router, attribute, top_k + 1)
    try:
        _, weights, ids = router.forward(*args, **kwargs)
    finally:
        setattr(router, attribute, top_k)
    return WiderChoice(ids, weights)


def next_ids_and_weights(
    ids: torch.Tensor, g: torch.Tensor, wider: WiderChoice, *, renormalises: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which expert comes next, and its weight on the scale of the received ones.

    Where scores tie, the k + 1 best need not hold the k best: the best of those that do not serve the token comes next.

    Args:
        ids: int64 [T, k], the coalitions.
        g: float64 [T, k], the received gate weights.
        wider: the k + 1 best.
        renormalises: whether the router's weights sum to one (times a constant).

    Returns:
        int64 [T] and float64 [T].
    """
    candidates, weights = wider.ids.to(ids), wider.weights.to(g)
    unused = (candidates.unsqueeze(2) != ids.unsqueeze(1)).all(2)
    place = torch.where(unused, weights, -torch.inf).argmax(1, keepdim=True)
    weight = weights.gather(1, place)
    if renormalises:
        others = weights.sum(1, keepdim=True) - weight
        weight = torch.where(others > 0, g.sum(1, keepdim=True) * weight / others, 0)
    return candidates.gather(1, place).squeeze(1), weight.squeeze(1)


def growth(seen: Observed, gate_scale: GateScale) -> torch.Tensor:
    """``g'_j / g_j - 1`` of the experts that stay when each of the token's experts goes, float64 [T, k]."""
    if seen.renormalises:
        n = seen.next.weights.unsqueeze(1) if seen.next is not None else 0
        rest = seen.g.sum(1, keepdim=True) - seen.g + n
        return torch.where(rest > 0, (seen.g - n) / rest, 0)
    if gate_scale == "trained" or seen.router_scores == "sigmoid":
        return torch.zeros_like(seen.g)
    own = seen.router_logits.to(seen.g).softmax(-1).gather(1, seen.ids)
    return own / (1 - own).clamp_min(torch.finfo(own.dtype).eps)


def output_change(seen: Observed, gate_scale: GateScale) -> torch.Tensor:
    """``|sum_B g'_j E_j - y|^2 / |h|^2`` for every expert of every token, float64 [T, k]; 0 where ``h`` is 0."""
    grown = growth(seen, gate_scale)
    coefficients = grown.unsqueeze(2) * seen.g.unsqueeze(1)  # [T, i, j]
    coefficients.diagonal(dim1=1, dim2=2).copy_(-seen.g)
    products = seen.output_products
    if seen.next is not None:
        added = (1 + grown) * seen.next.weights.unsqueeze(1)
        coefficients = torch.cat([coefficients, added.unsqueeze(2)], dim=2)
        edge = seen.next_products
        products = torch.cat([products, edge[:, :-1].unsqueeze(1)], dim=1)
        products = torch.cat([products, edge.unsqueeze(2)], dim=2)
    change = (torch.bmm(coefficients, products) * coefficients).sum(2).clamp_min(0)
    return change * seen.residual_scale**2 * seen.residual_square_inverse.unsqueeze(1)
