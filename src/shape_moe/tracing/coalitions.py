"""Coalition tables: which sets of experts served tokens, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shape_moe.errors import CheckpointError

COUNT_COLUMNS = ("prompt", "response", "prompt_half", "response_half")
"""Tokens by segment, over all examples and over the first half (even folds) alone."""


@dataclass(frozen=True)
class CoalitionTable:
    """The observed coalitions of one layer, each once, in lexicographic order.

    Attributes:
        members: int [C, k], expert ids ascending in a row.
        counts: int64 or float64 [C, 4], columns as in :data:`COUNT_COLUMNS`.
    """

    members: NDArray[np.int64]
    counts: NDArray[Any]

    def weighted(self, prompt: float, response: float) -> NDArray[Any]:
        """Tokens per coalition with segments weighted; whole numbers stay whole."""
        if prompt == 1 and response == 1:
            return np.asarray(self.counts[:, 0] + self.counts[:, 1])
        return np.asarray(prompt * self.counts[:, 0] + response * self.counts[:, 1])

    def half(self, half: int) -> CoalitionTable:
        """The table of one half of the examples (0: even folds, 1: odd folds)."""
        first = self.counts[:, 2:]
        counts = first if half == 0 else self.counts[:, :2] - first
        rows = counts.any(axis=1)
        held = counts[rows]
        inside = held if half == 0 else np.zeros_like(held)
        return CoalitionTable(self.members[rows], np.concatenate([held, inside], axis=1))


def tabulate(members: NDArray[np.integer], segments: NDArray[np.integer], folds: NDArray[np.integer]) -> CoalitionTable:
    """Count coalitions.

    Args:
        members: int [T, k], the experts that served each token, in any order.
        segments: [T], 0 for prompt and 1 for response tokens.
        folds: [T], the fold of the token's example.
    """
    counts = np.zeros((len(members), 4), dtype=np.int64)
    counts[np.arange(len(members)), segments] = 1
    counts[:, 2:] = counts[:, :2] * (folds % 2 == 0)[:, None]
    return add_up(np.sort(members.astype(np.int64), axis=1), counts)


def add_up(members: NDArray[np.int64], counts: NDArray[Any]) -> CoalitionTable:
    """Add the counts of equal coalitions up; rows of ``members`` are sorted already."""
    width = members.shape[1]
    keys = [f"e{i}" for i in range(width)]
    frame = pl.DataFrame(members, schema=keys, orient="row").hstack(
        pl.DataFrame(counts, schema=list(COUNT_COLUMNS), orient="row")
    )
    total = frame.group_by(keys).agg(pl.col(COUNT_COLUMNS).sum()).sort(keys)
    return CoalitionTable(total.select(keys).to_numpy(), total.select(COUNT_COLUMNS).to_numpy())


def merge_tables(tables: Sequence[CoalitionTable], weights: Sequence[float]) -> CoalitionTable:
    """Add several tables of the same layer up, each multiplied by its weight."""
    counts = [t.counts if w == 1 else t.counts * float(w) for t, w in zip(tables, weights, strict=True)]
    return add_up(np.concatenate([t.members for t in tables]), np.concatenate(counts))


def write_table(table: CoalitionTable, file: Path) -> None:
    """Write a table as Parquet: columns ``e0 .. e{k-1}``, then the counts."""
    keys = [f"e{i}" for i in range(table.members.shape[1])]
    frame = pl.DataFrame(table.members.astype(np.int16), schema=keys, orient="row")
    whole = frame.hstack(pl.DataFrame(table.counts, schema=list(COUNT_COLUMNS), orient="row"))
    with file.open("wb") as stream:  # Polars reads patterns and ~ into the names of files
        whole.write_parquet(stream)


def read_table(file: Path, top_k: int) -> CoalitionTable:
    """Read a table that :func:`write_table` wrote.

    Raises:
        CheckpointError: when the file is missing, damaged or has other columns.
    """
    keys = [f"e{i}" for i in range(top_k)]
    try:
        with file.open("rb") as stream:  # Polars reads patterns and ~ into the names of files
            frame = pl.read_parquet(stream, columns=[*keys, *COUNT_COLUMNS])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise CheckpointError(f"{file} is missing or is not a coalition table.") from error
    members = frame.select(keys).to_numpy().astype(np.int64)
    return CoalitionTable(members, frame.select(COUNT_COLUMNS).to_numpy())
