"""Coverage curves: how much of a layer's value its best experts hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.reporting.figures.figure import Figure, State, Swatch, Table, packed
from shape_moe.reporting.figures.values import shares
from shape_moe.scoring.scores import Scores
from shape_moe.selection.rules import layer_ranks
from shape_moe.selection.selection import Selection
from shape_moe.units import percent

_BACKGROUND_POINTS = 128
_LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)


def coverage_curves(scores: Scores) -> NDArray[np.float64]:
    """Cumulative share of value against rank.

    Returns:
        float64 [L, E + 1]: entry ``n`` is what the ``n`` best experts of the layer hold; 0 in a layer without value.
    """
    ranks = layer_ranks(scores.values, scores.tiebreak)
    ordered = np.take_along_axis(shares(scores), np.argsort(ranks, axis=1), axis=1)
    return np.concatenate([np.zeros((len(ordered), 1)), np.cumsum(ordered, axis=1)], axis=1)


def experts_needed(curves: NDArray[np.float64], level: float) -> NDArray[np.int64]:
    """The smallest number of best experts that hold a share ``level`` of each layer's value, int [L]."""
    reached = curves >= level - 1e-12
    return np.asarray(np.where(reached.any(axis=1), reached.argmax(axis=1), curves.shape[1] - 1))


def coverage_figure(scores: Scores, selection: Selection | None, mass: NDArray[np.float64] | None) -> Figure:
    """All layers' curves in the background, the chosen layer's in front, and where the selection cuts it.

    Args:
        scores: the values.
        selection: what is kept, None where nothing was selected.
        mass: float [L], see :func:`~shape_moe.reporting.figures.layers.kept_mass`; None where nothing was selected.
    """
    curves = coverage_curves(scores)
    experts = np.arange(curves.shape[1])
    alpha = selection.alpha if selection is not None else None
    data: list[dict[str, Any]] = [
        {**_background(curves), "name": "other layers", "line": {"color": "@faint", "width": 1}, "hoverinfo": "skip"},
        {"name": "this layer", "x": packed(experts.astype(np.int32)), "line": {"color": "@kept", "width": 3}},
    ]
    data[1]["hovertemplate"] = "the best %{x} experts hold %{y:.2f} %<extra></extra>"
    data = [{"type": "scatter", "mode": "lines", **trace} for trace in data]
    if selection is not None:
        data.append(_cut_trace())
    return Figure(
        name="coverage",
        title="Coverage of value by the best experts",
        label="",
        data=data,
        layout=_layout(alpha, curves.shape[1] - 1),
        height=400,
        legend=_legend(selection),
        states=_states(scores, selection, mass, curves),
        choice="layer",
        table=_table(scores, curves),
    )


def _background(curves: NDArray[np.float64]) -> dict[str, Any]:
    """All curves as one line with gaps, at no more points than a screen shows."""
    step = -(-(curves.shape[1] - 1) // _BACKGROUND_POINTS)
    ranks = np.unique(np.append(np.arange(0, curves.shape[1], step), curves.shape[1] - 1))
    gap = np.full((len(curves), 1), np.nan)
    x = np.concatenate([np.tile(ranks.astype(np.float64), (len(curves), 1)), gap], axis=1)
    y = np.concatenate([100 * curves[:, ranks], gap], axis=1)
    return {"x": packed(x.ravel()), "y": packed(y.ravel()), "connectgaps": False}


def _cut_trace() -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "kept here",
        "marker": {"color": "@mark", "size": 12, "symbol": "diamond", "line": {"color": "@surface", "width": 2}},
        "hovertemplate": "keeps %{x} experts, which hold %{y:.2f} %<extra></extra>",
    }


def _legend(selection: Selection | None) -> tuple[Swatch, ...]:
    lines = (Swatch("this layer", "line", ("kept",)), Swatch("other layers", "line", ("faint",)))
    if selection is None:
        return lines
    alpha = selection.alpha
    line = (Swatch(f"alpha = {percent(alpha)}", "line", ("mark",)),) if alpha is not None and alpha <= 1 else ()
    return (*lines, Swatch("kept here", "diamond", ("mark",)), *line)


def _layout(alpha: float | None, experts: int) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "number of best experts"}, "range": [0, experts]},
        "yaxis": {"title": {"text": "share of the layer's value, %"}, "range": [0, 102]},
    }
    if alpha is not None and alpha <= 1:
        line = {"color": "@mark", "width": 1.5, "dash": "dash"}
        edge = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 100 * alpha, "y1": 100 * alpha, "line": line}
        layout["shapes"] = [edge]
    return layout


def _states(
    scores: Scores, selection: Selection | None, mass: NDArray[np.float64] | None, curves: NDArray[np.float64]
) -> tuple[State, ...]:
    halves = experts_needed(curves, 0.5)
    states = []
    for row, layer in enumerate(scores.layers):
        curve = {"y": packed(100 * curves[row])}
        text = f"Layer {layer}: its {halves[row]} best experts hold half of its value."
        patches: list[dict[str, Any]] = [{}, curve]
        if selection is not None and mass is not None:
            kept = len(selection.layers[layer])
            held = None if np.isnan(mass[row]) else 100 * float(mass[row])
            patches.append({"x": [kept], "y": [held]})
            text += f" It keeps {kept} of {scores.num_experts}, which hold {percent(float(mass[row]), 2)}."
        states.append(State(str(layer), f"Coverage curve. {text}", patches, lines=(text,)))
    return tuple(states)


def _table(scores: Scores, curves: NDArray[np.float64]) -> Table:
    needed = [experts_needed(curves, level) for level in _LEVELS]
    rows = tuple((str(layer), *(str(int(counts[row])) for counts in needed)) for row, layer in enumerate(scores.layers))
    headings = ("Layer", *(percent(level, 0) for level in _LEVELS))
    return Table("Experts needed to hold a share of the layer's value", headings, rows)
