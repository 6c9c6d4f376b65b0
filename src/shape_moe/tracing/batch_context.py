"""Where the tokens of a batch are counted: which class of examples, cell and fold each of them belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from shape_moe.calibration.batches import CELLS, FOLDS, PADDING
from shape_moe.tracing.classes import NO_CLASS
from shape_moe.tracing.statistics import HALVES

if TYPE_CHECKING:
    from shape_moe.calibration.batches import Batch


@dataclass
class BatchContext:
    """Which class, cell and fold every token of the running batch belongs to.

    Padding goes to one extra place behind the real ones, which is thrown away: no tensor has to be filtered.

    Attributes:
        segments: int64 [T].
        folds: int64 [T].
        kinds: int64 [T], ``class * 4 + cell``, :data:`PADDING` for padding.
        num_kinds: how many of them there are.
    """

    segments: torch.Tensor
    folds: torch.Tensor
    kinds: torch.Tensor
    num_kinds: int
    _on_device: dict[torch.device, Places] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, classes: Sequence[str] = (NO_CLASS,)) -> BatchContext:
        """The context of a batch, whose examples are of these classes (whatever they are, if there is but one)."""
        places = [classes.index(e.group or NO_CLASS) if len(classes) > 1 else 0 for e in batch.examples]
        cells = batch.cells
        of_class = torch.tensor(places, dtype=torch.int64).repeat_interleave(batch.input_ids.shape[1])
        kinds = torch.where(cells == PADDING, PADDING, of_class * len(CELLS) + cells)
        return cls(batch.segments.to(torch.int64), batch.folds.to(torch.int64), kinds, len(classes) * len(CELLS))

    def on(self, device: torch.device) -> Places:
        """Where every token of the batch is counted, on ``device``."""
        if device not in self._on_device:
            real = self.kinds != PADDING
            cells = torch.where(real, self.kinds * FOLDS + self.folds, self.num_kinds * FOLDS)
            halves = torch.where(real, self.kinds * HALVES + self.folds % HALVES, self.num_kinds * HALVES)
            present, which = torch.unique(cells, return_inverse=True)
            one_hot = torch.nn.functional.one_hot(which, len(present)).T
            found = (self.segments, self.folds, cells, halves, present, one_hot)
            self._on_device[device] = Places(*(t.to(device) for t in found))
        return self._on_device[device]


@dataclass(frozen=True)
class Places:
    """Where tokens are counted, int64.

    Attributes:
        segments: [T].
        folds: [T].
        cells: [T], place in (class, cell, fold).
        half_cells: [T], place in (class, cell, half).
        present: the different ``cells`` of the batch, ascending.
        one_hot: [P, T], 1 where a token's cell is the one that is present.
    """

    segments: torch.Tensor
    folds: torch.Tensor
    cells: torch.Tensor
    half_cells: torch.Tensor
    present: torch.Tensor
    one_hot: torch.Tensor
