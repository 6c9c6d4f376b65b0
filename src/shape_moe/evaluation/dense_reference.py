"""What a model says at the scored positions of a batch, and what the dense model said, kept in little room."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from shape_moe.architectures.loading import input_device
from shape_moe.calibration.batches import Batch
from shape_moe.errors import ShapeMoeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

RowLogits = Callable[[slice], "torch.Tensor"]
"""Logits [rows, vocabulary] of a slice of a batch's scored positions."""

_MEMORY_LIMIT = 2 * 2**30
_NUMBERS_AT_A_TIME = 2**24
_SAME = 1e-6
"""Mean KL divergence in nats up to which logits count as computed again."""


@dataclass(frozen=True)
class Entered:
    """What entered an output layer.

    Attributes:
        states: [rows, hidden].
        head: the output layer.
        device: where it takes them.
    """

    states: torch.Tensor
    head: torch.nn.Module
    device: torch.device

    def logits(self, rows: slice) -> torch.Tensor:
        """What the output layer makes of some of them."""
        import torch

        with torch.no_grad():
            logits: torch.Tensor = self.head(self.states[rows].to(self.device))
        return logits


@dataclass(frozen=True)
class Outputs:
    """A model's output at the scored positions of a batch.

    Attributes:
        logits: [rows, vocabulary], in the model's dtype, where the model computed them.
        entered: what they were computed from, None where that was not looked at.
    """

    logits: torch.Tensor
    entered: Entered | None = None

    def slices(self) -> Iterator[slice]:
        """Rows that are worked on together."""
        step = max(1, _NUMBERS_AT_A_TIME // self.logits.shape[-1])
        yield from (slice(start, start + step) for start in range(0, len(self.logits), step))

    def come_again(self, entered: Entered) -> bool:
        """Whether the output layer alone gives the logits again: some models scale or cap them afterwards."""
        total = 0.0
        for rows in self.slices():
            again = entered.logits(rows).to(self.logits.device)
            total += float(kl_divergence(logprobs(self.logits[rows]), logprobs(again)).sum())
        return total <= _SAME * len(self.logits)


class DenseReference:
    """The dense model's logits at every scored position of a set.

    Kept is what entered the output layer (thousands of numbers a token, not a vocabulary's), with the layer itself,
    where that gives the logits again, and the logits where it does not: in memory, beyond 2 GiB on disk. Use it as a
    context manager, or call :meth:`close`: the files go when it ends.
    """

    def __init__(self, memory_limit: int = _MEMORY_LIMIT) -> None:
        self._kept: dict[int, torch.Tensor] = {}
        self._heads: dict[int, tuple[torch.nn.Module, torch.device]] = {}
        self._used, self._limit = 0, memory_limit
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> DenseReference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything that is kept; the files go as well."""
        self._kept.clear()
        self._heads.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, batch: int, outputs: Outputs) -> None:
        """Keep what a batch's logits are computed from, or the logits."""
        entered = outputs.entered
        if entered is not None and outputs.come_again(entered):
            self._heads[batch] = (entered.head, entered.device)
            self._keep(batch, entered.states.cpu())
        else:
            self._keep(batch, outputs.logits.cpu())

    def logits(self, batch: int, device: torch.device) -> RowLogits:
        """The logits of a batch."""
        kept = self._found(batch)
        if batch not in self._heads:
            return lambda rows: kept[rows].to(device)
        entered = Entered(kept, *self._heads[batch])
        return lambda rows: entered.logits(rows).to(device)

    def _keep(self, batch: int, numbers: torch.Tensor) -> None:
        size = numbers.numel() * numbers.element_size()
        if self._used + size <= self._limit:
            self._kept[batch] = numbers
            self._used += size
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="shape-moe-")
        try:
            save_file({"kept": numbers.contiguous()}, Path(self._folder.name) / f"{batch}.safetensors")
        except (OSError, SafetensorError) as error:
            raise ShapeMoeError(
                f"What the dense model said does not fit {self._folder.name}: judge fewer or shorter examples "
                "(--samples, --max-length), or name a larger disk in TMPDIR."
            ) from error

    def _found(self, batch: int) -> torch.Tensor:
        if batch in self._kept:
            return self._kept[batch]
        from safetensors.torch import load_file

        assert self._folder is not None
        numbers: torch.Tensor = load_file(Path(self._folder.name) / f"{batch}.safetensors")["kept"]
        return numbers


def scored_outputs(model: PreTrainedModel, batch: Batch, scored: torch.Tensor, *, entered: bool = False) -> Outputs:
    """Run a model over a batch.

    Args:
        model: the model.
        batch: the batch.
        scored: bool [B, T - 1], whether the token after each position is scored.
        entered: look at what enters the output layer as well.
    """
    import torch

    device, columns = input_device(model), scored.any(dim=0).nonzero()[:, 0]
    head, seen = model.get_output_embeddings() if entered else None, []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0])) if head is not None else None
    try:
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                logits_to_keep=columns.to(device),
                use_cache=False,
            ).logits
    finally:
        if hook is not None:
            hook.remove()
    chosen = scored[:, columns]
    found = None
    if head is not None and len(seen) == 1 and seen[0].shape[:2] == chosen.shape:
        device = seen[0].device
        found = Entered(seen[0][chosen.to(device)], head, device)
    return Outputs(logits[chosen.to(logits.device)], found)


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, float32."""
    return logits.float().log_softmax(-1)


def kl_divergence(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``sum p log(p / q)`` of log-probabilities [rows, vocabulary], summed in float64; in nats."""
    p = dense.double()
    return (p.exp() * (p - other.double())).sum(-1).clamp(min=0)  # below zero by rounding only
