"""How far scorers agree about one trace: rank correlation, and overlap of the sets that they would keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.reporting.figures.figure import Figure, State, Table, plain
from shape_moe.scoring.scores import Scores
from shape_moe.units import NONE


def average_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0 along the last axis; equal values share the mean of their ranks."""
    ranks = np.empty(values.shape)
    for row, line in enumerate(values):
        _, group, counts = np.unique(line, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        ranks[row] = ((ends - counts + ends - 1) / 2)[group]
    return ranks


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's rank correlation of two tables of values [L, E], layer by layer.

    Returns:
        float64 [L]; NaN for a layer in which either table is constant.
    """
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (average_ranks(first), average_ranks(second)))
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.asarray(np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0))


def correlation_matrix(scores: list[Scores]) -> NDArray[np.float64]:
    """Mean over layers of Spearman's rank correlation between every two scorers, float64 [S, S]."""
    matrix = np.full((len(scores), len(scores)), np.nan)
    for row, first in enumerate(scores):
        for column, second in enumerate(scores[: row + 1]):
            by_layer = spearman(first.values, second.values)
            if np.isfinite(by_layer).any():
                matrix[row, column] = matrix[column, row] = np.nanmean(by_layer)
    return matrix


def overlap_matrix(masks: list[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """Share of the kept experts that two selections of the same size have in common, float64 [S, S]."""
    flat = np.stack([mask.ravel() for mask in masks]).astype(np.float64)
    return np.asarray((flat @ flat.T) / flat.sum(axis=1)[:, None])


def agreement_figure(scores: list[Scores], masks: Mapping[str, NDArray[np.bool_]], how: str) -> Figure:
    """Two matrices to choose between.

    Args:
        scores: of at least two scorers.
        masks: bool [L, E] by scorer, what each would keep; empty where nothing was selected.
        how: the rule and the size, in words.
    """
    names = [entry.scorer for entry in scores]
    views = [("Rank correlation", "mean over layers of Spearman's rank correlation", correlation_matrix(scores))]
    if masks:
        overlap = overlap_matrix([masks[name] for name in names])
        views.append(("Overlap of kept sets", f"share of kept experts in common, {how}", overlap))
    states = tuple(
        State(
            title,
            _label(title, meaning, names, matrix),
            [_patch(names, matrix, title)],
            lines=(f"{meaning[0].upper()}{meaning[1:]}.",),
        )
        for title, meaning, matrix in views
    )
    return Figure(
        name="agreement",
        title="Agreement between scorers",
        label="",
        data=[_trace(names)],
        layout={
            "xaxis": {"tickangle": -40, "showgrid": False, "type": "category", "dtick": 1},
            "yaxis": {"autorange": "reversed", "showgrid": False, "type": "category", "dtick": 1},
        },
        height=150 + 38 * len(names),
        states=states,
        narrow={"xaxis": {"tickangle": -60}},
        table=_table(names, views[-1][2], views[-1][0]),
    )


def _trace(names: list[str]) -> dict[str, Any]:
    labels = [plain(name) for name in names]
    return {
        "type": "heatmap",
        "x": labels,
        "y": labels,
        "xgap": 2,
        "ygap": 2,
        "showscale": False,
        "colorscale": [[0, "@sequence-low"], [1, "@sequence-high"]],
        "texttemplate": "%{text}",
        "textfont": {"color": "@text"},
        "hovertemplate": "%{y} and %{x}: %{z:.3f}<extra></extra>",
        "hoverongaps": False,
    }


def _patch(names: list[str], matrix: NDArray[np.float64], title: str) -> dict[str, Any]:
    off = matrix[~np.eye(len(names), dtype=bool)]
    low = float(np.nanmin(off)) if np.isfinite(off).any() else 0.0
    cells = [[None if np.isnan(value) else float(value) for value in row] for row in matrix]
    text = [[_two_digits(value) for value in row] for row in matrix]
    return {"name": title, "z": cells, "text": text, "zmin": min(low, 0.99), "zmax": 1}


def _two_digits(value: float) -> str:
    return NONE if np.isnan(value) else f"{round(float(value), 2) + 0.0:.2f}"  # no minus before a zero


def _label(title: str, meaning: str, names: list[str], matrix: NDArray[np.float64]) -> str:
    rows, columns = np.triu_indices(len(names), 1)
    values = matrix[rows, columns]
    if not np.isfinite(values).any():
        return f"{title}: no two scorers can be compared."
    most, least = int(np.nanargmax(values)), int(np.nanargmin(values))
    pairs = [f"{names[rows[i]]} and {names[columns[i]]} ({values[i]:.2f})" for i in (most, least)]
    return f"Matrix of scorers, {meaning}. Most alike: {pairs[0]}; least alike: {pairs[1]}."


def _table(names: list[str], matrix: NDArray[np.float64], title: str) -> Table:
    rows = tuple((name, *(_two_digits(value) for value in row)) for name, row in zip(names, matrix, strict=True))
    return Table(title, ("Scorer", *names), rows)
