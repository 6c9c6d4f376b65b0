"""Right-padded batches of examples, with the segment and the fold of every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shape_moe.calibration.examples import Example
from shape_moe.errors import DataError

if TYPE_CHECKING:
    import torch

PROMPT, RESPONSE, PADDING = 0, 1, -1
SEGMENTS = ("prompt", "response")
CELLS = ("prompt", "prompt_predicting", "response", "response_predicting")
"""Tokens by their own segment and by whether the *next* token is response: cell ``2 * segment + predicting``."""
FOLDS = 8
"""Examples are dealt into this many folds by their position, so that stability can be told from a trace alone."""


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        input_ids: int64 [B, T], right-padded.
        attention_mask: int64 [B, T], 1 on tokens.
        segments: int8 [B * T], :data:`PROMPT`, :data:`RESPONSE` or :data:`PADDING`.
        folds: int8 [B * T], the fold of the token's example.
        examples: the examples in row order.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    segments: torch.Tensor
    folds: torch.Tensor
    examples: tuple[Example, ...]

    @property
    def cells(self) -> torch.Tensor:
        """int64 [B * T], the index in :data:`CELLS` of every token, :data:`PADDING` for padding."""
        import torch

        rows = self.segments.view(self.input_ids.shape).to(torch.int64)
        predicting = torch.zeros_like(rows)
        predicting[:, :-1] = (rows[:, 1:] == RESPONSE).to(torch.int64)
        return torch.where(rows == PADDING, PADDING, 2 * rows + predicting).flatten()

    def rows(self, rows: Sequence[int]) -> Batch:
        """The same batch with some of its rows alone."""
        shape = self.input_ids.shape
        chosen = list(rows)
        return Batch(
            self.input_ids[chosen],
            self.attention_mask[chosen],
            self.segments.view(shape)[chosen].flatten(),
            self.folds.view(shape)[chosen].flatten(),
            tuple(self.examples[row] for row in chosen),
        )


def make_batch(examples: Sequence[Example], positions: Sequence[int], pad_id: int) -> Batch:
    """Put examples into one right-padded batch.

    Args:
        examples: the examples, one row each.
        positions: each example's position in the whole set; decides its fold.
        pad_id: token id of the padding (its value is never looked at).

    Raises:
        DataError: when no example has a token.
    """
    import torch

    if not any(example.tokens for example in examples):
        raise DataError("A batch holds nothing but padding: its examples have no tokens.")
    shape = (len(examples), max(len(example.tokens) for example in examples))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    segments = torch.full(shape, PADDING, dtype=torch.int8)
    folds = torch.zeros(shape, dtype=torch.int8)
    for row, (example, position) in enumerate(zip(examples, positions, strict=True)):
        length = len(example.tokens)
        input_ids[row, :length] = torch.tensor(example.tokens)
        segments[row, :length] = PROMPT
        for begin, end in example.spans:
            segments[row, begin:end] = RESPONSE
        folds[row] = position % FOLDS
    mask = (segments != PADDING).to(torch.int64)
    return Batch(input_ids, mask, segments.flatten(), folds.flatten(), tuple(examples))


def batches(examples: Sequence[Example], batch_size: int, pad_id: int) -> Iterator[Batch]:
    """Batch examples of one fold and of like length together.

    What a batch holds depends on the examples and ``batch_size`` alone. The longest come first, so that memory runs
    out at once or never.
    """
    groups = []
    for fold in range(FOLDS):
        members = range(fold, len(examples), FOLDS)
        order = sorted(members, key=lambda i: (-len(examples[i].tokens), i))
        groups += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for rows in sorted(groups, key=lambda rows: (-len(examples[rows[0]].tokens), rows[0])):
        yield make_batch([examples[i] for i in rows], rows, pad_id)
