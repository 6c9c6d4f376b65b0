"""How far apart results may be: relative to what is compared, because processors round sums differently."""

from __future__ import annotations

import torch

FLOAT32 = 1e-4
"""For logits of tiny models in float32, whose kernels, batches and numbers of threads differ."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the root mean square of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    scale = expected.square().mean().sqrt()
    assert scale > 0, "nothing to compare with"
    return float((found - expected).abs().max() / scale)
