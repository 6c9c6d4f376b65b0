"""What every expert is worth, and which ones are kept: layers x experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.reporting.figures.figure import (
    Figure,
    State,
    Swatch,
    Table,
    packed,
    smallest_integers,
)
from shape_moe.scoring.scores import Scores
from shape_moe.selection.rules import layer_ranks
from shape_moe.selection.selection import Selection
from shape_moe.units import NONE, percent

_FAINTEST = (0.01, 0.5)
"""The value below which experts are as faint as can be lies between these parts of their layer's mean."""
_FAINT_SHARE = 0.02
_KEPT_SCALE = [[0, "@kept-low"], [1, "@kept-high"]]
_DROPPED_SCALE = [[0, "@dropped-low"], [1, "@dropped-high"]]
_LAYERS_PER_INCH = 14


def shares(scores: Scores) -> NDArray[np.float64]:
    """Each expert's share of its layer's value, where negative values count as nothing.

    Returns:
        float64 [L, E]; rows add up to 1, or are 0 in a layer without any positive value.
    """
    mass = np.maximum(scores.values, 0)
    whole = mass.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(mass, whole, out=np.zeros_like(mass), where=whole > 0))


def brightness(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares on a logarithmic scale from 0 (among the least) to 1 (the largest of all).

    The least are the smallest fiftieth of all experts, if that lies between a hundredth and half of a layer's mean.
    """
    relative = share * share.shape[1]
    low = float(np.clip(np.quantile(relative, _FAINT_SHARE), *_FAINTEST))
    high = max(float(relative.max()), 2.0)
    return np.asarray(np.log(np.maximum(relative, low) / low) / np.log(high / low))


def heat_map(scores: Scores | None, selection: Selection | None) -> Figure:
    """The map of all experts; at least one of the two must be there.

    Args:
        scores: values, None where only the selection is known.
        selection: what is kept, None where nothing was selected; its layers are those of the scores.
    """
    layers = list(scores.layers if scores is not None else selection.layers if selection is not None else ())
    mask = np.ones((len(layers), _experts(scores, selection)), dtype=bool) if selection is None else selection.mask()
    valued, arrays = scores is not None, {"kept": packed(mask.astype(np.uint8))}
    share, table = None, None
    if scores is None:
        arrays["shade"] = packed(np.ones(mask.shape))
    else:
        share, ranks = shares(scores), layer_ranks(scores.values, scores.tiebreak)
        table = best_experts(scores, selection, share, ranks)
        arrays |= {
            "shade": packed(brightness(share)),
            "share": packed(100 * share),
            "rank": packed(smallest_integers(ranks, mask.shape[1])),
            "tokens": packed(scores.activations),
        }
    return Figure(
        name="values",
        title="Value of every expert" if valued else "Kept experts",
        label=_label(share, selection),
        data=[_trace("kept" if selection else "value", _KEPT_SCALE, valued), _trace("dropped", _DROPPED_SCALE, valued)],
        layout={
            "xaxis": {"title": {"text": "experts of the layer"}, "showgrid": False, "zeroline": False},
            "yaxis": {"title": {"text": "layer"}, "type": "category", "autorange": "reversed", "showgrid": False},
        },
        height=int(min(760, max(240, 110 + len(layers) * _LAYERS_PER_INCH))),
        states=_states() if valued else (),
        narrow={"yaxis": {"title": {"text": ""}}},
        decode="cells",
        arrays={**arrays, "layers": layers},
        legend=_legend(valued=valued, selected=selection is not None),
        table=table,
    )


def _experts(scores: Scores | None, selection: Selection | None) -> int:
    return scores.num_experts if scores is not None else selection.num_experts if selection is not None else 0


def _states() -> tuple[State, ...]:
    ranked = "Experts ordered by value, best first, so that the kept ones form the left part of every row."
    by_id = "Experts ordered by their id in the model."
    return (
        State("Best first", ranked, layout={"xaxis": {"title": {"text": "rank of the expert in its layer"}}}),
        State("By expert id", by_id, layout={"xaxis": {"title": {"text": "expert id"}}}),
    )


def _trace(status: str, scale: list[list[Any]], valued: bool) -> dict[str, Any]:
    hover = "layer %{y}, expert %{customdata[0]}: <b>" + status + "</b>"
    if valued:
        hover += (
            "<br>rank %{customdata[1]}, %{customdata[2]:.3~g} % of the layer's value<br>%{customdata[3]:,.5~g} tokens"
        )
    return {
        "type": "heatmap",
        "colorscale": scale,
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": hover + "<extra></extra>",
    }


def _legend(*, valued: bool, selected: bool) -> tuple[Swatch, ...]:
    scale = ", little to much value" if valued else ""
    if not selected:
        return (Swatch("little to much value", "ramp", ("kept-low", "kept-high")),)
    kind = "ramp" if valued else "block"
    colours = [(name, (f"{name}-low", f"{name}-high")[not valued :]) for name in ("kept", "dropped")]
    return tuple(Swatch(f"{name}{scale}", kind, pair) for name, pair in colours)


def _label(share: NDArray[np.float64] | None, selection: Selection | None) -> str:
    parts = []
    if selection is not None:
        parts.append(
            f"{selection.kept:,} of {selection.total:,} experts are kept, {selection.num_experts} in each of "
            f"{len(selection.layers)} layers before pruning."
        )
    if share is not None:
        top = share.max(axis=1)
        parts.append(
            f"The most valuable expert of a layer holds {percent(float(top.min()))} to {percent(float(top.max()))} of "
            "its layer's value."
        )
    return "Heat map of layers by experts. " + " ".join(parts)


def best_experts(
    scores: Scores,
    selection: Selection | None,
    share: NDArray[np.float64],
    ranks: NDArray[np.int64],
    count: int = 5,
) -> Table:
    """The most valuable experts of every layer, and the most valuable one that is dropped.

    Args:
        scores: the values.
        selection: what is kept, None where nothing was selected.
        share: float [L, E], see :func:`shares`.
        ranks: int [L, E], see :func:`~shape_moe.selection.rules.layer_ranks`.
        count: how many of every layer.
    """
    mask = np.ones(ranks.shape, dtype=bool) if selection is None else selection.mask()
    rows = []
    for row, layer in enumerate(scores.layers):
        order = np.argsort(ranks[row])
        best = ", ".join(f"{expert} ({percent(share[row, expert])})" for expert in order[:count])
        dropped = order[~mask[row][order]]
        lost = f"{dropped[0]} ({percent(share[row, dropped[0]])})" if len(dropped) else NONE
        rows.append((str(layer), best, *((lost,) if selection else ()), str(int((scores.activations[row] <= 0).sum()))))
    headings = ("Layer", "Best experts (share of the layer's value)", "Best dropped expert", "Never used")
    chosen = headings if selection else (*headings[:2], headings[3])
    return Table(f"The {count} most valuable experts of every layer", chosen, tuple(rows), texts=2)
