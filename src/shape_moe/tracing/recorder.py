"""Accumulators of one MoE layer: what is added up while a model runs, on the device on which it runs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from shape_moe.calibration.batches import FOLDS, PADDING, SEGMENTS
from shape_moe.errors import ShapeMoeError
from shape_moe.tracing.coalitions import CoalitionTable, merge_tables, tabulate
from shape_moe.tracing.statistics import HALVES, SUMMED_PER_SLOT, SUMMED_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shape_moe.calibration.batches import Batch
    from shape_moe.tracing.trace import Array

_CELLS = len(SEGMENTS) * FOLDS
_HALF_CELLS = len(SEGMENTS) * HALVES
_CHUNK_BYTES = 8 * 2**20
"""Expert outputs are looked at in float32 chunks of about this size: they stay in cache, and memory stays flat."""
_COMPACT_ROWS = 200_000
_NOT_FINITE = (
    "Layer {layer}: the experts' {what} are not finite; the checkpoint has NaN or infinite weights, "
    "or its dtype overflows."
)


@dataclass
class BatchContext:
    """Which segment and fold every token of the running batch belongs to.

    Padding goes to one extra cell behind the real ones, which is thrown away: no tensor has to be filtered.
    """

    segments: torch.Tensor
    folds: torch.Tensor
    _on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> BatchContext:
        """The context of a batch."""
        return cls(batch.segments.to(torch.int64), batch.folds.to(torch.int64))

    def cells(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cell of every token in (segment, fold) and in (segment, half), int64 [T] each, on ``device``."""
        if device not in self._on_device:
            real = self.segments != PADDING
            cell = torch.where(real, self.segments * FOLDS + self.folds, _CELLS)
            half = torch.where(real, self.segments * HALVES + self.folds % HALVES, _HALF_CELLS)
            self._on_device[device] = (cell.to(device), half.to(device))
        return self._on_device[device]


class LayerRecorder:
    """Sums over the tokens of one layer.

    Args:
        layer: decoder-layer index, for messages.
        num_experts: routed experts.
        residual_scale: the family's factor on the block's output.
        router_scores: how router logits become probabilities.
    """

    def __init__(
        self, layer: int, num_experts: int, residual_scale: float, router_scores: Literal["softmax", "sigmoid"]
    ) -> None:
        self.layer, self.num_experts = layer, num_experts
        self.scale, self.router_scores = residual_scale, router_scores
        self.context: BatchContext | None = None
        self.residual: torch.Tensor | None = None
        self.normed: torch.Tensor | None = None
        self.calls = 0
        self._checked = False
        self._sums: dict[str, torch.Tensor] = {}
        self._finite: torch.Tensor | None = None
        self._ids: list[torch.Tensor] = []
        self._cells: list[torch.Tensor] = []
        self._table: CoalitionTable | None = None

    @property
    def recording(self) -> bool:
        """Whether a batch is under way; other forward passes leave no trace."""
        return self.context is not None

    def start(self, context: BatchContext) -> None:
        """Begin a batch."""
        self.context, self.calls = context, 0

    def _accumulators(self, device: torch.device) -> dict[str, torch.Tensor]:
        if not self._sums:
            home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
            cells, experts = _CELLS + 1, self.num_experts
            shapes = {
                "slots": (cells * experts, len(SUMMED_PER_SLOT)),
                "tokens": (cells, len(SUMMED_PER_TOKEN)),
                "largest": (cells * experts,),
                "probability": (cells, experts),
                "gram": ((_HALF_CELLS + 1) * experts * experts,),
                "gram_relative": ((_HALF_CELLS + 1) * experts * experts,),
            }
            self._sums = {k: torch.zeros(s, dtype=torch.float64, device=home) for k, s in shapes.items()}
        return self._sums

    @torch.no_grad()
    def add_router(self, logits: torch.Tensor) -> None:
        """Add the router's probabilities of all experts; logits are [T, E]."""
        if self.context is None:
            return
        logits = logits.reshape(-1, self.num_experts).float()
        self._check_length(self.context, len(logits))
        sums = self._accumulators(logits.device)["probability"]
        probabilities = logits.sigmoid() if self.router_scores == "sigmoid" else logits.softmax(-1)
        cell, _ = self.context.cells(sums.device)
        one_hot = torch.nn.functional.one_hot(cell, _CELLS + 1).T.to(torch.float64)
        sums += one_hot @ probabilities.to(sums)

    @torch.no_grad()
    def add(self, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add one call of the experts module.

        Args:
            hidden: the module's input [T, H].
            ids: experts of every token [T, k].
            gates: gate weights as received [T, k].
            outputs: expert outputs before weighting [T, k, H].

        Raises:
            ShapeMoeError: when the batch's segments do not fit, or the residual stream is not the one that feeds
                this block.
        """
        context, residual = self._check_call(hidden)
        sums = self._accumulators(outputs.device)
        home = sums["slots"].device
        found = _inner_products(outputs, residual)
        products, with_residual, residual_square = (t.to(home).double() for t in found)
        ids, gates = ids.to(home), gates.to(home, torch.float64)
        cell, half_cell = context.cells(home)

        pairs = products * (gates.unsqueeze(2) * gates.unsqueeze(1)) * self.scale**2
        along_output = pairs.sum(2)
        output_square = along_output.sum(1).clamp_min(0)
        along_residual = self.scale * (gates * with_residual).sum(1)
        turned = one_minus_cosine(residual_square, output_square, along_residual)

        norms = products.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        gated = gates * norms
        total = gates.sum(1, keepdim=True)
        renormalised = torch.where(total != 0, gates / total, 0)
        slots = [
            torch.ones_like(gates),
            gates,
            renormalised,
            norms,
            gated,
            renormalised * norms,
            gated * turned[:, None],
        ]
        slot_index = (cell.unsqueeze(1) * self.num_experts + ids).flatten()
        sums["slots"].index_add_(0, slot_index, torch.stack(slots, dim=-1).flatten(0, 1))
        sums["largest"].scatter_reduce_(0, slot_index, norms.flatten(), "amax")
        tokens = torch.stack([torch.ones_like(output_square), output_square, residual_square], dim=-1)
        sums["tokens"].index_add_(0, cell, tokens)

        square = self.num_experts**2
        pair_index = ids.unsqueeze(2) * self.num_experts + ids.unsqueeze(1) + half_cell[:, None, None] * square
        sums["gram"].index_add_(0, pair_index.flatten(), pairs.flatten())
        relative = torch.where(residual_square > 0, 1 / residual_square, 0)
        sums["gram_relative"].index_add_(0, pair_index.flatten(), (pairs * relative[:, None, None]).flatten())

        finite = torch.isfinite(output_square).all()
        self._finite = finite if self._finite is None else self._finite & finite
        self._ids.append(ids.to(torch.int16))

    def _check_call(self, hidden: torch.Tensor) -> tuple[BatchContext, torch.Tensor]:
        context, residual, normed = self.context, self.residual, self.normed
        if context is None or residual is None or normed is None:
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts ran before the norm of their residual stream; "
                "the family's facts do not fit this model."
            )
        self._check_length(context, len(hidden))
        if not self._checked:
            self._check_residual(normed, hidden)
        self.calls += 1
        self.residual = self.normed = None
        return context, residual.reshape(hidden.shape)

    def _check_residual(self, normed: torch.Tensor, hidden: torch.Tensor) -> None:
        """Once per layer: the experts' input must be the norm of the residual stream that was recorded."""
        if not bool(torch.isfinite(hidden).all()):
            raise ShapeMoeError(_NOT_FINITE.format(layer=self.layer, what="inputs"))
        if normed.shape[-1] != hidden.shape[-1] or not torch.equal(normed.reshape(hidden.shape), hidden):
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts' input is not the norm of the residual stream; "
                "the family's facts do not fit this model."
            )
        self._checked = True

    def _check_length(self, context: BatchContext, tokens: int) -> None:
        if tokens != len(context.segments):
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts received {tokens} tokens where the batch has "
                f"{len(context.segments)}: the model drops or repeats tokens, and segments cannot be told."
            )

    def finish(self) -> None:
        """End a batch.

        Raises:
            ShapeMoeError: when the experts did not run exactly once, or gave values that are not finite.
        """
        context, self.context = self.context, None
        if context is None or self.calls != 1:
            raise ShapeMoeError(
                f"Layer {self.layer}: the experts ran {self.calls} times in one forward pass instead of once; "
                "something bypasses the experts interface."
            )
        if self._finite is not None and not bool(self._finite):
            raise ShapeMoeError(_NOT_FINITE.format(layer=self.layer, what="outputs"))
        self._cells.append(torch.where(context.segments == PADDING, -1, context.segments * FOLDS + context.folds))
        if sum(len(cells) for cells in self._cells) > _COMPACT_ROWS:
            self._compact()

    def _compact(self) -> None:
        if not self._ids:
            return
        members = torch.cat([ids.cpu() for ids in self._ids]).numpy()
        cells = torch.cat(self._cells).numpy()
        real = cells >= 0
        table = tabulate(members[real], cells[real] // FOLDS, cells[real] % FOLDS)
        self._table = table if self._table is None else merge_tables([self._table, table], [1, 1])
        self._ids, self._cells = [], []

    def coalitions(self) -> CoalitionTable:
        """The coalitions of all batches so far."""
        self._compact()
        assert self._table is not None
        return self._table

    def statistics(self) -> dict[str, Array]:
        """Every statistic of this layer over all batches so far, without the layer axis."""
        experts, segments = self.num_experts, len(SEGMENTS)
        sums = {name: tensor.cpu().numpy() for name, tensor in self._sums.items()}
        slots = sums["slots"][: _CELLS * experts].reshape(segments, FOLDS, experts, -1)
        tokens = sums["tokens"][:_CELLS].reshape(segments, FOLDS, -1)
        result: dict[str, Array] = {name: slots[..., i] for i, name in enumerate(SUMMED_PER_SLOT)}
        result |= {name: tokens[..., i] for i, name in enumerate(SUMMED_PER_TOKEN)}
        result["largest_norm"] = sums["largest"][: _CELLS * experts].reshape(segments, FOLDS, experts)
        result["router_probability"] = sums["probability"][:_CELLS].reshape(segments, FOLDS, experts)
        for name in ("gram", "gram_relative"):
            square = experts * experts
            result[name] = sums[name][: _HALF_CELLS * square].reshape(segments, HALVES, experts, experts)
        for name in ("tokens", "layer_tokens"):
            result[name] = np.rint(result[name]).astype(np.int64)
        return result


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


def _inner_products(outputs: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``<E_i, E_j>`` [T, k, k], ``<E_i, h>`` [T, k] and ``|h|^2`` [T] in full float32."""
    tokens, top_k, hidden = outputs.shape
    step = max(1, _CHUNK_BYTES // (4 * top_k * hidden))
    pairs, with_residual, squares = [], [], []
    with _full_float32_products(outputs.device):
        for start in range(0, tokens, step):
            chunk = outputs[start : start + step].float()
            stream = residual[start : start + step].float()
            pairs.append(torch.bmm(chunk, chunk.transpose(1, 2)))
            with_residual.append(torch.bmm(chunk, stream.unsqueeze(2)).squeeze(2))
            squares.append((stream * stream).sum(1))
    return torch.cat(pairs), torch.cat(with_residual), torch.cat(squares)


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
