"""What one call of a layer's experts module shows, and what follows from it: the arguments of every statistic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from shape_moe.tracing.replacement import NextChoice

_CHUNK_BYTES = 8 * 2**20
"""Expert outputs are looked at in float32 chunks of about this size: they stay in cache, and memory stays flat."""


@dataclass(frozen=True)
class Observed:
    """The tokens of one call, padding among them; ``T`` tokens, ``k`` slots, ``H`` hidden, ``E`` experts.

    Attributes:
        h: residual stream before the norm that feeds the block [T, H], in the model's dtype and on its device.
        ids: int64 [T, k], the experts that served each token.
        g: float64 [T, k], gate weights as the experts module received them.
        outputs: ``E_i``, outputs before weighting [T, k, H], in the model's dtype and on its device.
        router_logits: float32 [T, E].
        segments: int64 [T], 0 for prompt, 1 for response, -1 for padding.
        folds: int64 [T], the fold of the token's example.
        residual_scale: the family's factor on the block's output.
        router_scores: how router logits become probabilities.
        renormalises: whether gate weights sum to one (times a constant) over the top-k.
        next: the router's next choice; None where it is not recorded, and where no expert is left to choose.

    What is derived is float64 and lies where ``g`` does (on the device that runs the model, or on the CPU where that
    knows no float64), from inner products in full float32, or in float64 where the model's outputs are.
    """

    h: torch.Tensor
    ids: torch.Tensor
    g: torch.Tensor
    outputs: torch.Tensor
    router_logits: torch.Tensor
    segments: torch.Tensor
    folds: torch.Tensor
    residual_scale: float
    router_scores: Literal["softmax", "sigmoid", "other"]
    renormalises: bool = True
    next: NextChoice | None = None

    @property
    def one_per_slot(self) -> torch.Tensor:
        """1 for every slot [T, k]."""
        return torch.ones_like(self.g)

    @property
    def one_per_token(self) -> torch.Tensor:
        """1 for every token [T]."""
        return torch.ones_like(self.g[:, 0])

    @cached_property
    def y(self) -> torch.Tensor:
        """The routed output ``sum_i g_i E_i`` times the residual scale, float64 [T, H], not rounded as the model's."""
        parts = []
        for rows in self._chunks():
            outputs = self.outputs[rows].to(self.g.device).double()
            parts.append(self.residual_scale * torch.bmm(self.g[rows].unsqueeze(1), outputs).squeeze(1))
        return torch.cat(parts)

    @cached_property
    def _inner_products(self) -> tuple[torch.Tensor, ...]:
        """``<E_i, E_j>`` [T, k, k], ``<E_i, h>`` [T, k], ``|h|^2`` [T], and the products of ``E_n`` [T, k + 1]."""
        found: list[tuple[torch.Tensor, ...]] = []
        wide = torch.promote_types(self.outputs.dtype, torch.float32)
        with _full_float32_products(self.outputs.device):
            for rows in self._chunks():
                chunk, stream = self.outputs[rows].to(wide), self.h[rows].to(wide)
                pairs = torch.bmm(chunk, chunk.transpose(1, 2))
                along = torch.bmm(chunk, stream.unsqueeze(2)).squeeze(2)
                of_next = stream[:, :0]
                if self.next is not None:
                    added = self.next.outputs[rows].to(wide)
                    beside = torch.bmm(chunk, added.unsqueeze(2)).squeeze(2)
                    of_next = torch.cat([beside, (added * added).sum(1, keepdim=True)], dim=1)
                found.append((pairs, along, (stream * stream).sum(1), of_next))
        return tuple(torch.cat(parts).to(self.g.device).double() for parts in zip(*found, strict=True))

    def _chunks(self) -> Iterator[slice]:
        tokens, top_k, hidden = self.outputs.shape
        step = max(1, _CHUNK_BYTES // (4 * top_k * hidden))
        return (slice(start, start + step) for start in range(0, tokens, step))

    @property
    def output_products(self) -> torch.Tensor:
        """``<E_i, E_j>`` [T, k, k]."""
        return self._inner_products[0]

    @property
    def residual_products(self) -> torch.Tensor:
        """``<E_i, h>`` [T, k]."""
        return self._inner_products[1]

    @property
    def residual_square(self) -> torch.Tensor:
        """``|h|^2`` [T]."""
        return self._inner_products[2]

    @property
    def next_products(self) -> torch.Tensor:
        """``<E_j, E_n>`` for the token's experts ``j``, and ``|E_n|^2`` last [T, k + 1]; empty without ``next``."""
        return self._inner_products[3]

    @property
    def residual_square_inverse(self) -> torch.Tensor:
        """``1 / |h|^2`` [T]; 0 where that is 0."""
        return torch.where(self.residual_square > 0, 1 / self.residual_square, 0)

    @cached_property
    def contribution_products(self) -> torch.Tensor:
        """``<a_i, a_j>`` [T, k, k] with ``a_i = g_i E_i`` times the residual scale."""
        return self.output_products * (self.g.unsqueeze(2) * self.g.unsqueeze(1)) * self.residual_scale**2

    @cached_property
    def output_square(self) -> torch.Tensor:
        """``|y|^2`` [T]."""
        return self.contribution_products.sum((1, 2)).clamp_min(0)

    @cached_property
    def norms(self) -> torch.Tensor:
        """``|E_i|`` [T, k]."""
        return self.output_products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()

    @cached_property
    def g_renormalised(self) -> torch.Tensor:
        """``g`` divided by its sum over the token's slots [T, k]; 0 where that is 0."""
        total = self.g.sum(1, keepdim=True)
        return torch.where(total != 0, self.g / total, 0)

    @cached_property
    def turned(self) -> torch.Tensor:
        """``1 - cos(h, h + y)`` [T], see :func:`one_minus_cosine`."""
        along = self.residual_scale * (self.g * self.residual_products).sum(1)
        return one_minus_cosine(self.residual_square, self.output_square, along)

    @cached_property
    def router_probability(self) -> torch.Tensor:
        """The router's probability of every expert [T, E]."""
        logits = self.router_logits
        probabilities = logits.sigmoid() if self.router_scores == "sigmoid" else logits.softmax(-1)
        return probabilities.to(self.g)


def one_minus_cosine(residual_square: torch.Tensor, output_square: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """``1 - cos(h, h + y)`` from ``|h|^2``, ``|y|^2`` and ``<h, y>``, stable for small ``y``.

    ``sin^2 = (|h|^2 |y|^2 - <h,y>^2) / (|h|^2 |h+y|^2)`` and ``1 - cos = sin^2 / (1 + cos)``; the plain difference
    loses all digits when ``y`` is small against ``h``. Zero where either vector is zero.
    """
    sum_square = residual_square + 2 * along + output_square
    scale = residual_square * sum_square
    defined = scale > 0
    safe = torch.where(defined, scale, 1)
    sine_square = ((residual_square * output_square - along**2) / safe).clamp(0, 1)
    cosine = ((residual_square + along) / safe.sqrt()).clamp(-1, 1)
    result = torch.where(cosine > 0, sine_square / (1 + cosine.clamp_min(0)), 1 - cosine)
    return torch.where(defined, result, 0)


@contextmanager
def _full_float32_products(device: torch.device) -> Iterator[None]:
    """Keep matrix products out of TF32 and bfloat16, whatever the user allows elsewhere."""
    backend: Any = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    if backend is None:
        yield
        return
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before
