"""Teacher-forced figures: likelihood of the right tokens, and distance to the dense model's distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.errors import ShapeMoeError
from shape_moe.evaluation.dense_reference import (
    DenseReference,
    Outputs,
    RowLogits,
    kl_divergence,
    logprobs,
    scored_outputs,
)
from shape_moe.evaluation.held_out_set import HeldOutSet, scored_positions
from shape_moe.progress import Advance

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from shape_moe.calibration.batches import Batch


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

    def part(self, start: int, end: int | None) -> TeacherForced:
        """The sums of consecutive examples."""
        return TeacherForced(**{name: value[start:end] for name, value in vars(self).items()})

    def to_items(self) -> dict[str, list[Any]]:
        """For JSON."""
        return {name: value.tolist() for name, value in vars(self).items()}

    @classmethod
    def from_items(cls, items: Mapping[str, list[Any]]) -> TeacherForced:
        """What :meth:`to_items` gave."""
        return cls(**{name: np.array(value) for name, value in items.items()})


def record_dense(
    model: PreTrainedModel, held_out: HeldOutSet, reference: DenseReference, advance: Advance = lambda _: None
) -> TeacherForced:
    """Run the dense model over a set, keep what it said in ``reference`` and return its own figures.

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
    sums = Sums(held_out)
    for number, (positions, batch) in enumerate(held_out.batches()):
        outputs = scored_outputs(model, batch, scored_positions(batch), entered=dense)
        sums.add(positions, batch, outputs, None if dense else reference.logits(number, outputs.logits.device))
        if dense:
            reference.put(number, outputs)
        advance(len(positions))
    return sums.result()


class Sums:
    """Teacher-forced sums of one model in the making, batch by batch.

    Args:
        held_out: the examples.
    """

    def __init__(self, held_out: HeldOutSet) -> None:
        self._held_out, count = held_out, len(held_out.examples)
        self._tokens, self._agree, self._wrong = np.zeros((3, count), dtype=np.int64)
        self._nll, self._kl = np.zeros((2, count))

    def add(self, positions: Sequence[int], batch: Batch, outputs: Outputs, dense: RowLogits | None) -> None:
        """Add a batch.

        Args:
            positions: where its examples stand in the set.
            batch: the batch.
            outputs: what the model said at its scored positions.
            dense: what the dense model said there, None where this is the dense model.

        Raises:
            ShapeMoeError: when the logits are not finite.
        """
        scored = scored_positions(batch)
        row_of, column_of = (index.numpy() for index in scored.nonzero(as_tuple=True))
        example = np.asarray(positions)[row_of]
        figures = _Rows.measure(outputs, dense, batch.input_ids[:, 1:][scored])
        ends = np.array([len(row.tokens) for row in batch.examples])
        for row, position in enumerate(positions):
            if batch.examples[row].spans:
                ends[row] = batch.examples[row].prompt_length + len(self._held_out.response(position))
        counts = column_of + 1 < ends[row_of]
        np.add.at(self._tokens, example, 1)
        np.add.at(self._nll, example, figures.nll)
        np.add.at(self._kl, example, figures.kl)
        np.add.at(self._agree, example, figures.agree)
        np.add.at(self._wrong, example, ~figures.right & counts)

    def result(self) -> TeacherForced:
        """The sums over all batches so far."""
        exact = (self._wrong == 0) & (self._tokens > 0)
        return TeacherForced(self._tokens, self._nll, self._kl, self._agree, exact)


@dataclass(frozen=True)
class _Rows:
    """Figures of single positions."""

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.int64]
    right: NDArray[np.bool_]

    @classmethod
    def measure(cls, outputs: Outputs, dense: RowLogits | None, targets: torch.Tensor) -> _Rows:
        """Compare logits with the right tokens, and with the dense model's logits where they are given.

        Raises:
            ShapeMoeError: when the logits are not finite.
        """
        count = len(targets)
        figures = cls(np.zeros(count), np.zeros(count), np.ones(count, dtype=np.int64), np.zeros(count, dtype=bool))
        for rows in outputs.slices():
            q = logprobs(outputs.logits[rows])
            if not bool(q.isfinite().all()):
                raise ShapeMoeError(
                    "The model's logits are not finite: it cannot be judged in this dtype; try another --dtype."
                )
            best, right = q.argmax(-1), targets[rows].to(q.device)
            figures.nll[rows] = -q.gather(1, right[:, None])[:, 0].double().cpu().numpy()
            figures.right[rows] = (best == right).cpu().numpy()
            if dense is not None:
                p = logprobs(dense(rows))
                figures.kl[rows] = kl_divergence(p, q).cpu().numpy()
                figures.agree[rows] = (best == p.argmax(-1)).cpu().numpy()
        return figures
