"""A statistic: how far an expert works against the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shape_moe.tracing.statistics import statistic

if TYPE_CHECKING:
    import torch

    from shape_moe.tracing.observed import Observed


@statistic("opposed", per="slot", meaning="g max(0, -<E_i, h + y>)")
def opposed(seen: Observed) -> torch.Tensor:
    """Gate weight times the part of the expert's output that points against the stream behind the block.

    Args:
        seen: ``h`` [T, H], ``ids`` [T, k], ``g`` [T, k], ``outputs`` (``E_i``) [T, k, H] and ``y`` [T, H] of one call.

    Returns:
        One term per slot [T, k]; the recorder adds them up by layer, expert, segment and fold.
    """
    stream = seen.h.to(seen.y) + seen.y
    along = (seen.outputs.to(seen.y) * stream.unsqueeze(1)).sum(-1)
    return seen.g * (-along).clamp_min(0)
