"""How many experts every layer keeps, and how much of its value they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.reporting.figures.figure import Figure, Swatch, Table, layer_axis
from shape_moe.reporting.figures.values import shares
from shape_moe.scoring.scores import Scores
from shape_moe.selection.selection import Selection
from shape_moe.units import percent


def kept_mass(selection: Selection, scores: Scores | None) -> NDArray[np.float64]:
    """Share of each layer's value that the kept experts hold.

    Args:
        selection: what is kept.
        scores: the values; None to take what the selection records.

    Returns:
        float64 [L]; NaN for a layer without positive values, or of which nothing is known.
    """
    if scores is None:
        recorded = [selection.mass_kept.get(layer) for layer in selection.layers]
        return np.array([np.nan if share is None else share for share in recorded], dtype=np.float64)
    share = shares(scores)
    kept = (share * selection.mask()).sum(axis=1)
    return np.where(share.any(axis=1), kept, np.nan)


def layer_figure(selection: Selection, mass: NDArray[np.float64]) -> Figure:
    """Kept experts by layer as bars, and the share of value that they hold above them.

    Args:
        selection: what is kept.
        mass: float [L], see :func:`kept_mass`.
    """
    names = [str(layer) for layer in selection.layers]
    counts = [len(ids) for ids in selection.layers.values()]
    dropped = [selection.num_experts - count for count in counts]
    known = bool(np.isfinite(mass).any())
    bars = {"type": "bar", "x": names, "xaxis": "x", "yaxis": "y"}
    data: list[dict[str, Any]] = [
        {**bars, "name": "kept", "y": counts, "marker": {"color": "@kept"}},
        {**bars, "name": "dropped", "y": dropped, "marker": {"color": "@dropped"}},
    ]
    for trace in data:
        trace["hovertemplate"] = "layer %{x}: %{y} " + str(trace["name"]) + "<extra></extra>"
    layout = {
        "barmode": "stack",
        "bargap": 0.18,
        "xaxis": layer_axis(names, anchor="y"),
        "yaxis": {
            "title": {"text": "experts"},
            "domain": [0, 0.62 if known else 1],
            "range": [0, selection.num_experts],
        },
    }
    if known:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "value kept",
                "x": names,
                "y": [None if np.isnan(share) else 100 * share for share in mass],
                "yaxis": "y2",
                "cliponaxis": False,
                "marker": {"color": "@mark", "size": 7, "symbol": "diamond"},
                "hovertemplate": "layer %{x}: %{y:.2f} % of the value kept<extra></extra>",
            }
        )
        layout["yaxis2"] = {
            "title": {"text": "value kept, %"},
            "domain": [0.7, 1],
            "anchor": "x",
            "range": _value_range(100 * mass[np.isfinite(mass)]),
            "nticks": 4,
        }
    marks = (Swatch("value kept", "diamond", ("mark",)),) if known else ()
    return Figure(
        name="layers",
        title="What every layer keeps",
        label=_label(counts, mass),
        data=data,
        layout=layout,
        height=410 if known else 280,
        legend=(Swatch("kept", "block", ("kept",)), Swatch("dropped", "block", ("dropped",)), *marks),
        narrow={"xaxis": {"nticks": 9}},
        table=_table(selection, mass),
    )


def _value_range(shown: NDArray[np.float64]) -> list[float]:
    """An axis with room around every marker, and several ticks even where all layers keep the same."""
    low, high = float(shown.min()), float(shown.max())
    room = max(0.15 * (high - low), 1.0)
    return [max(low - room, -1.0), high + room]


def _label(counts: list[int], mass: NDArray[np.float64]) -> str:
    text = f"Bars by layer: between {min(counts)} and {max(counts)} experts are kept."
    if np.isfinite(mass).any():
        low, high = percent(float(np.nanmin(mass)), 2), percent(float(np.nanmax(mass)), 2)
        text += f" The kept experts hold {low} to {high} of their layer's value."
    return text


def _table(selection: Selection, mass: NDArray[np.float64]) -> Table:
    rows = tuple(
        (
            str(layer),
            str(len(ids)),
            str(selection.num_experts - len(ids)),
            percent(len(ids) / selection.num_experts),
            percent(float(share), 2),
        )
        for (layer, ids), share in zip(selection.layers.items(), mass, strict=True)
    )
    return Table("What every layer keeps", ("Layer", "Kept", "Dropped", "Experts kept", "Value kept"), rows)
