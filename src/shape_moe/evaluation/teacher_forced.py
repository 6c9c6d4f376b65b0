"""Teacher-forced figures: likelihood of the right tokens, and distance to the dense model's distributions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.loading import input_device
from shape_moe.calibration.batches import Batch
from shape_moe.errors import ShapeMoeError
from shape_moe.evaluation.held_out import HeldOutSet, scored_positions
from shape_moe.progress import Advance

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_MEMORY_LIMIT = 2 * 2**30
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class TeacherForced:
    """Sums over the scored tokens of each example; examples without any have zeros.

    Attributes:
        tokens: scored tokens.
        nll: negative log-likelihood of the right tokens, in nats.
        kl: KL divergence ``sum p log(p / q)`` of the model's distribution ``q`` from the dense model's ``p``, in nats.
        agree: positions at which both models' most likely next token is the same.
        exact: whether every token up to the end of the response is the most likely one, which is when greedy
            generation gives that response.
    """

    tokens: NDArray[np.int64]
    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.int64]
    exact: NDArray[np.bool_]

    def to_items(self) -> dict[str, list[Any]]:
        """For JSON."""
        return {name: value.tolist() for name, value in vars(self).items()}

    @classmethod
    def from_items(cls, items: Mapping[str, list[Any]]) -> TeacherForced:
        """What :meth:`to_items` gave."""
        return cls(**{name: np.array(value) for name, value in items.items()})


class DenseReference:
    """The dense model's log-probabilities at every scored position of a set, float32; on disk beyond 2 GiB.

    Use it as a context manager, or call :meth:`close`: the files go when it ends.
    """

    def __init__(self, memory_limit: int = _MEMORY_LIMIT) -> None:
        self._kept: dict[int, torch.Tensor] = {}
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
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, batch: int, logprobs: torch.Tensor) -> None:
        """Keep the log-probabilities [rows, vocabulary] of a batch."""
        size = logprobs.numel() * logprobs.element_size()
        if self._used + size <= self._limit:
            self._kept[batch] = logprobs
            self._used += size
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="shape-moe-")
        try:
            save_file({"logprobs": logprobs.contiguous()}, Path(self._folder.name) / f"{batch}.safetensors")
        except (OSError, SafetensorError) as error:
            raise ShapeMoeError(
                f"The dense model's log-probabilities do not fit {self._folder.name}: judge fewer or shorter examples "
                "(--samples, --max-length), or name a larger disk in TMPDIR."
            ) from error

    def get(self, batch: int) -> torch.Tensor:
        """The log-probabilities of a batch."""
        if batch in self._kept:
            return self._kept[batch]
        from safetensors.torch import load_file

        assert self._folder is not None
        logprobs: torch.Tensor = load_file(Path(self._folder.name) / f"{batch}.safetensors")["logprobs"]
        return logprobs


def record_dense(
    model: PreTrainedModel, held_out: HeldOutSet, reference: DenseReference, advance: Advance = lambda _: None
) -> TeacherForced:
    """Run the dense model over a set, keep its log-probabilities in ``reference`` and return its own figures.

    Raises:
        ShapeMoeError: when its logits are not finite.
    """
    return _run(model, held_out, reference, advance, dense=True)


def compare_with_dense(
    model: PreTrainedModel, held_out: HeldOutSet, reference: DenseReference, advance: Advance = lambda _: None
) -> TeacherForced:
    """Figures of a model (masked or loaded from a pruned checkpoint) beside the dense model's.

    Args:
        model: the model.
        held_out: the set that ``reference`` was recorded on.
        reference: filled by :func:`record_dense`.
        advance: called with the number of examples done.

    Raises:
        ShapeMoeError: when its logits are not finite.
    """
    return _run(model, held_out, reference, advance, dense=False)


def _run(
    model: PreTrainedModel, held_out: HeldOutSet, reference: DenseReference, advance: Advance, *, dense: bool
) -> TeacherForced:
    count = len(held_out.examples)
    tokens, agree = np.zeros((2, count), dtype=np.int64)
    nll, kl = np.zeros((2, count))
    wrong = np.zeros(count, dtype=np.int64)
    for number, (positions, batch) in enumerate(held_out.batches()):
        scored = scored_positions(batch)
        logprobs = scored_logprobs(model, batch, scored)
        row_of, column_of = (index.numpy() for index in scored.nonzero(as_tuple=True))
        example = np.asarray(positions)[row_of]
        targets = batch.input_ids[:, 1:][scored]
        if dense:
            reference.put(number, logprobs)
        figures = _Rows.measure(logprobs, None if dense else reference.get(number), targets)
        ends = np.array([len(row.tokens) for row in batch.examples])
        for row, position in enumerate(positions):
            prompt = batch.examples[row].prompt_length
            if prompt < ends[row]:
                ends[row] = prompt + len(held_out.response(position))
        counts = column_of + 1 < ends[row_of]
        np.add.at(tokens, example, 1)
        np.add.at(nll, example, figures.nll)
        np.add.at(kl, example, figures.kl)
        np.add.at(agree, example, figures.agree)
        np.add.at(wrong, example, ~figures.right & counts)
        advance(len(positions))
    return TeacherForced(tokens, nll, kl, agree, (wrong == 0) & (tokens > 0))


def scored_logprobs(model: PreTrainedModel, batch: Batch, scored: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token at the scored positions, float32 [rows, vocabulary], on the CPU.

    Raises:
        ShapeMoeError: when they are not finite.
    """
    import torch

    device = input_device(model)
    columns = scored.any(dim=0).nonzero()[:, 0]
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            logits_to_keep=columns.to(device),
            use_cache=False,
        ).logits
        chosen = logits[scored[:, columns].to(logits.device)]
        del logits
        logprobs = torch.empty(chosen.shape, dtype=torch.float32)
        for start in range(0, len(chosen), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            logprobs[rows] = chosen[rows].float().log_softmax(-1).cpu()
    if not bool(logprobs.isfinite().all()):
        raise ShapeMoeError(
            "The model's logits are not finite: it cannot be judged in this dtype; try another --dtype."
        )
    return logprobs


@dataclass(frozen=True)
class _Rows:
    """Figures of single positions."""

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.int64]
    right: NDArray[np.bool_]

    @classmethod
    def measure(cls, logprobs: torch.Tensor, dense: torch.Tensor | None, targets: torch.Tensor) -> _Rows:
        import torch

        best = logprobs.argmax(-1)
        nll = -logprobs.gather(1, targets[:, None])[:, 0].double().numpy()
        right = (best == targets).numpy()
        if dense is None:
            return cls(nll, np.zeros(len(nll)), np.ones(len(nll), dtype=np.int64), right)
        kl = torch.cat([_kl(p, q) for p, q in _pairs(dense, logprobs)])
        return cls(nll, kl.numpy(), (best == dense.argmax(-1)).long().numpy(), right)


def _pairs(dense: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(dense), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        yield dense[rows], other[rows]


def _kl(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    p = dense.double()
    return (p.exp() * (p - other.double())).sum(-1).clamp(min=0)  # below zero by rounding only
