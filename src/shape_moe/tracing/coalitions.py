"""Coalition tables: which sets of experts served tokens, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shape_moe.calibration.batches import CELLS
from shape_moe.errors import CheckpointError
from shape_moe.tracing.token_weights import TokenWeights

_SEGMENT_COLUMNS = ("prompt", "response", "prompt_half", "response_half")
_PREDICTING_COLUMNS = (
    "prompt_predicting",
    "response_predicting",
    "prompt_predicting_half",
    "response_predicting_half",
)
COUNT_COLUMNS = _SEGMENT_COLUMNS + _PREDICTING_COLUMNS
"""Tokens by segment, over all examples and over the first half (even folds) alone; then those of them whose next token
is response."""
_WHOLE, _FIRST_HALF = [0, 1, 4, 5], [2, 3, 6, 7]


def _no_classes() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class CoalitionTable:
    """The observed coalitions of one layer, each once per class, in lexicographic order, then by class.

    Attributes:
        members: int [C, k], expert ids ascending in a row.
        counts: int64 or float64 [C, 8], columns as in :data:`COUNT_COLUMNS`.
        classes: int64 [C], the class of the tokens that are counted; all 0 where nothing is given.
    """

    members: NDArray[np.int64]
    counts: NDArray[Any]
    classes: NDArray[np.int64] = field(default_factory=_no_classes)

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.members):
            object.__setattr__(self, "classes", np.zeros(len(self.members), dtype=np.int64))

    def weighted(self, weights: TokenWeights | None = None) -> NDArray[Any]:
        """Tokens per row, weighted by their cells; whole numbers stay whole where nothing is weighted."""
        parts = weights.parts if weights is not None else ()
        if all(factor == 1 for factor, _ in parts):
            return np.asarray(self.counts[:, 0] + self.counts[:, 1])
        cells = self.by_cell()
        return np.asarray(sum(factor * (cells[:, a] + cells[:, b]) for factor, (a, b) in parts))

    def by_cell(self) -> NDArray[Any]:
        """Tokens per row by cell [C, 4], in the order of :data:`shape_moe.calibration.batches.CELLS`."""
        segments, predicting = self.counts[:, :2], self.counts[:, 4:6]
        cells = np.empty((len(self.members), len(CELLS)), dtype=self.counts.dtype)
        cells[:, 1::2] = predicting
        cells[:, ::2] = np.maximum(segments - predicting, 0)  # weighted counts are rounded
        return cells

    def half(self, half: int) -> CoalitionTable:
        """The table of one half of the examples (0: even folds, 1: odd folds)."""
        first = self.counts[:, _FIRST_HALF]
        held = first if half == 0 else self.counts[:, _WHOLE] - first
        counts = np.zeros_like(self.counts)
        counts[:, _WHOLE] = held
        if half == 0:
            counts[:, _FIRST_HALF] = held
        rows = counts.any(axis=1)
        return CoalitionTable(self.members[rows], counts[rows], self.classes[rows])

    def of_class(self, number: int) -> CoalitionTable:
        """The table of one class alone, as a table without classes."""
        rows = self.classes == number
        return CoalitionTable(self.members[rows], self.counts[rows])

    def pooled(self) -> CoalitionTable:
        """The table with all classes added up: each coalition once."""
        return add_up(self.members, self.counts) if self.classes.any() else self


def tabulate(
    members: NDArray[np.integer],
    segments: NDArray[np.integer],
    folds: NDArray[np.integer],
    predicting: NDArray[np.integer] | None = None,
    classes: NDArray[np.integer] | None = None,
) -> CoalitionTable:
    """Count coalitions.

    Args:
        members: int [T, k], the experts that served each token, in any order.
        segments: [T], 0 for prompt and 1 for response tokens.
        folds: [T], the fold of the token's example.
        predicting: [T], 1 where the next token is response; None where that is not known.
        classes: [T], the class of the token's example; None for one class.
    """
    counts = np.zeros((len(members), len(COUNT_COLUMNS)), dtype=np.int64)
    rows = np.arange(len(members))
    counts[rows, segments] = 1
    if predicting is not None:
        counts[rows, 4 + segments] = predicting
    counts[:, _FIRST_HALF] = counts[:, _WHOLE] * (folds % 2 == 0)[:, None]
    return add_up(np.sort(members.astype(np.int64), axis=1), counts, classes)


def add_up(
    members: NDArray[np.int64], counts: NDArray[Any], classes: NDArray[np.integer] | None = None
) -> CoalitionTable:
    """Add the counts of equal coalitions of a class up; rows of ``members`` are sorted already."""
    keys = [f"e{i}" for i in range(members.shape[1])]
    frame = pl.DataFrame(members, schema=keys, orient="row").hstack(
        pl.DataFrame(counts, schema=list(COUNT_COLUMNS), orient="row")
    )
    if classes is None or not classes.any():
        total = frame.group_by(keys).agg(pl.col(COUNT_COLUMNS).sum()).sort(keys)
        return CoalitionTable(total.select(keys).to_numpy(), total.select(COUNT_COLUMNS).to_numpy())
    frame = frame.with_columns(pl.Series("class", classes.astype(np.int64)))
    total = frame.group_by([*keys, "class"]).agg(pl.col(COUNT_COLUMNS).sum()).sort([*keys, "class"])
    return CoalitionTable(
        total.select(keys).to_numpy(), total.select(COUNT_COLUMNS).to_numpy(), total["class"].to_numpy()
    )


def merge_tables(tables: Sequence[CoalitionTable], weights: Sequence[float]) -> CoalitionTable:
    """Add several tables of the same layer up, each multiplied by its weight; their classes have the same numbers."""
    counts = [t.counts if w == 1 else t.counts * float(w) for t, w in zip(tables, weights, strict=True)]
    return add_up(
        np.concatenate([t.members for t in tables]),
        np.concatenate(counts),
        np.concatenate([t.classes for t in tables]),
    )


def write_table(table: CoalitionTable, file: Path) -> None:
    """Write a table as Parquet: columns ``e0 .. e{k-1}``, ``class``, then the counts."""
    keys = [f"e{i}" for i in range(table.members.shape[1])]
    frame = pl.DataFrame(table.members.astype(np.int16), schema=keys, orient="row")
    frame = frame.with_columns(pl.Series("class", table.classes.astype(np.int16)))
    whole = frame.hstack(pl.DataFrame(table.counts, schema=list(COUNT_COLUMNS), orient="row"))
    with file.open("wb") as stream:  # Polars reads patterns and ~ into the names of files
        whole.write_parquet(stream)


def read_table(file: Path, top_k: int, *, format_version: int = 2) -> CoalitionTable:
    """Read a table that :func:`write_table` wrote, or one of format 1, which has no classes and only segments.

    Raises:
        CheckpointError: when the file is missing or damaged, has other columns, or names experts by what is no integer.
    """
    keys = [f"e{i}" for i in range(top_k)]
    columns = list(_SEGMENT_COLUMNS) if format_version == 1 else ["class", *COUNT_COLUMNS]
    try:
        with file.open("rb") as stream:  # Polars reads patterns and ~ into the names of files
            frame = pl.read_parquet(stream, columns=[*keys, *columns])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise CheckpointError(f"{file} is missing or is not a coalition table.") from error
    for name in (*keys, *columns):
        if not frame[name].dtype.is_integer() and (name not in columns or name == "class"):
            raise CheckpointError(f"{file} is not a coalition table: its column {name} holds no integers.")
        if frame[name].null_count():
            raise CheckpointError(f"{file} is not a coalition table: its column {name} has gaps.")
    members = frame.select(keys).to_numpy().astype(np.int64)
    if format_version == 1:
        counts = frame.select(_SEGMENT_COLUMNS).to_numpy()
        table = CoalitionTable(members, np.concatenate([counts, np.zeros_like(counts)], axis=1))
    else:
        classes = frame["class"].to_numpy().astype(np.int64)
        table = CoalitionTable(members, frame.select(COUNT_COLUMNS).to_numpy(), classes)
    if (members[:, 1:] > members[:, :-1]).all():
        return table
    return add_up(np.sort(members, axis=1), table.counts, table.classes)  # written by other software
