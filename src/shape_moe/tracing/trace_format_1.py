"""Traces of format 1: one class, prompt and response tokens alone, and Gram matrices instead of contributions.

They are read as traces of today. A token's cell is that of its segment; whether it predicts a response is not known,
and nothing is counted there. ``contribution`` and ``contribution_relative`` are the row sums of the Gram matrices; as
those were kept in halves, the halves stand in folds 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from shape_moe.calibration.batches import CELLS, FOLDS, SEGMENTS
from shape_moe.tracing.statistics import Layout
from shape_moe.tracing.stored_statistics import Array, StoredStatistics

_ROW_SUMS = {"contribution": "gram", "contribution_relative": "gram_relative"}


def todays_layouts(found: Mapping[str, Layout]) -> dict[str, Layout]:
    """Layouts of what such a trace holds, what follows from it included."""
    sums = {name: Layout("expert", "sum") for name, gram in _ROW_SUMS.items() if gram in found and name not in found}
    return {**found, **sums}


class FormatOneStatistics(Mapping[str, Array]):
    """The arrays of a file of format 1 in today's shape.

    Args:
        file: the file.
        found: layouts of what it holds.
        layers: number of MoE layers.
        experts: routed experts per layer.
    """

    def __init__(self, file: Path, found: Mapping[str, Layout], layers: int, experts: int) -> None:
        def shape(layout: Layout) -> tuple[int, ...]:
            whole = layout.shape(layers, 1, experts)
            return (layers, len(SEGMENTS), *whole[3:])

        self._stored = StoredStatistics(file, found, shape)
        self._found, self._names = frozenset(found), tuple(todays_layouts(found))
        self._made: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = _in_cells(self._stored[name] if name in self._found else self._row_sum(name))
        return self._made[name]

    def _row_sum(self, name: str) -> Array:
        sums = self._stored[_ROW_SUMS[name]].sum(axis=4)
        folds = np.zeros((*sums.shape[:2], FOLDS, sums.shape[3]))
        folds[:, :, : sums.shape[2]] = sums
        return folds

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _in_cells(by_segment: Array) -> Array:
    """[layer, segment, ...] as [layer, class, cell, ...]."""
    cells = np.zeros((len(by_segment), 1, len(CELLS), *by_segment.shape[2:]), dtype=by_segment.dtype)
    cells[:, 0, :: len(CELLS) // len(SEGMENTS)] = by_segment
    return cells
