"""Coalitions: what is left of tokens' experts, and which experts work together in the chosen layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.reporting.figures.co_activation import (
    Meetings,
    lift_codes,
    neighbours,
    strongest_pairs,
    tokens_together,
)
from shape_moe.reporting.figures.figure import (
    Figure,
    State,
    Swatch,
    Table,
    layer_axis,
    number,
    packed,
    smallest_integers,
)
from shape_moe.selection.selection import Selection
from shape_moe.tracing.token_weights import TokenWeights
from shape_moe.tracing.trace import Trace
from shape_moe.units import counted, percent

Layers = Mapping[int, Meetings]
MOST_SHOWN = 128
"""Experts in a co-activation matrix: those with most tokens, where a layer has more."""
_PAIRS = 12
_PAIR_COLOURS = ("@kept", "@mark", "@dropped")
_LOST_SHOWN = 4
_LOST_COLOURS = ("@kept", "@lost-1", "@lost-2", "@lost-3", "@lost-4")


def lost_figure(layer_ids: Sequence[int], shares: NDArray[np.float64]) -> Figure:
    """Share of tokens, by layer, that lose none, one, two, ... of their experts.

    Args:
        layer_ids: the layers.
        shares: float [L, k + 1], see :func:`~shape_moe.reporting.figures.co_activation.lost_shares`.
    """
    top_k = shares.shape[1] - 1
    shown = min(_LOST_SHOWN, top_k)
    grouped = np.concatenate([shares[:, :shown], shares[:, shown:].sum(axis=1, keepdims=True)], axis=1)
    names = [
        "none lost",
        *(f"{count} lost" for count in range(1, shown)),
        f"{shown}{' or more' * (shown < top_k)} lost",
    ]
    layers = [str(layer) for layer in layer_ids]
    data = [
        {
            "type": "bar",
            "name": name,
            "x": layers,
            "y": packed(100 * grouped[:, column]),
            "marker": {"color": _LOST_COLOURS[column]},
            "hovertemplate": "layer %{x}: %{y:.1f} % of tokens, " + name + "<extra></extra>",
        }
        for column, name in enumerate(names)
    ]
    mean_lost = shares @ np.arange(top_k + 1)
    label = (
        f"Stacked bars by layer. Between {percent(float(shares[:, 0].min()))} and {percent(float(shares[:, 0].max()))} "
        f"of a layer's tokens keep all {top_k} of their experts; a token loses {mean_lost.mean():.2f} on average."
    )
    rows = tuple(
        (layer, *(percent(float(share)) for share in grouped[row]), f"{mean_lost[row]:.2f}")
        for row, layer in enumerate(layers)
    )
    return Figure(
        name="lost",
        title=f"How many of a token's {top_k} experts are dropped",
        label=label,
        data=data,
        layout={
            "barmode": "stack",
            "bargap": 0.18,
            "xaxis": layer_axis(layers),
            "yaxis": {"title": {"text": "share of tokens, %"}, "range": [0, 100]},
        },
        height=340,
        legend=tuple(Swatch(n, "block", (c[1:],)) for n, c in zip(names, _LOST_COLOURS, strict=False)),
        narrow={"xaxis": {"nticks": 9}},
        table=Table("Tokens by number of dropped experts", ("Layer", *names, "Mean lost"), rows),
    )


def co_activations(trace: Trace, weights: TokenWeights | None) -> Layers:
    """How often the experts of every layer meet."""
    experts, tables = trace.info.num_experts, trace.coalitions
    return {layer: Meetings(tokens_together(tables[layer], experts, weights)) for layer in trace.info.layers}


def matrix_figure(layers: Layers, selection: Selection | None) -> Figure:
    """The chosen layer's co-activation matrix, relative to what traffic alone would give."""
    states = []
    for layer, meetings in layers.items():
        is_kept = None if selection is None else np.isin(np.arange(selection.num_experts), selection.layers[layer])
        shown = _order(meetings, is_kept)
        kept = len(shown) if is_kept is None else int(is_kept[shown].sum())
        states.append(
            State(
                str(layer),
                _matrix_label(layer, meetings.together, len(shown)),
                layout=_kept_border(kept, len(shown)),
                arrays={
                    "ids": packed(smallest_integers(shown, len(meetings.together))),
                    "codes": packed(lift_codes(meetings, shown)),
                },
            )
        )
    axis = {
        "showticklabels": False,
        "ticks": "",
        "showline": False,
        "showgrid": False,
        "zeroline": False,
        "constrain": "domain",
    }
    return Figure(
        name="together",
        title="Which experts work together",
        label="",
        data=[_matrix_trace()],
        layout={
            "xaxis": dict(axis),
            "yaxis": {**axis, "autorange": "reversed", "scaleanchor": "x"},
            "plot_bgcolor": "@unknown",
        },
        height=480,
        states=tuple(states),
        choice="layer",
        decode="pairs",
        legend=(
            Swatch("an eighth to eight times as often", "ramp", ("less", "neutral", "more")),
            Swatch("too few tokens to tell", "block", ("unknown",)),
        ),
        wide=False,
        square=True,
    )


def pairs_figure(layers: Layers, selection: Selection | None) -> Figure:
    """The chosen layer's strongest pairs: tokens that both serve, and what traffic alone would give."""
    states, rows = [], []
    for layer, meetings in layers.items():
        kept = set(selection.layers[layer]) if selection else None
        pairs = strongest_pairs(meetings, _PAIRS)[::-1]
        status = [_status(pair.first, pair.second, kept) for pair in pairs]
        names = [f"{pair.first} + {pair.second}" for pair in pairs]
        tokens, expected = [pair.tokens for pair in pairs], [pair.expected for pair in pairs]
        patches: list[dict[str, Any]] = [
            {"x": [t if s == name else None for t, s in zip(tokens, status, strict=True)], "y": names}
            for name in _statuses(selection)
        ]
        patches.append({"x": expected, "y": names})
        best = pairs[-1] if pairs else None
        text = f"Layer {layer}: no pair meets more often than its traffic suggests."
        if best is not None:
            text = (
                f"Layer {layer}: experts {best.first} and {best.second} share {counted(best.tokens, 'token')}, "
                f"{number(best.tokens / best.expected, 2)} times as many as their traffic suggests."
            )
            rows.append(
                (str(layer), f"{best.first} + {best.second}", number(best.tokens), number(best.expected), status[-1])
            )
        states.append(State(str(layer), f"Bars of the strongest pairs. {text}", patches, lines=(text,)))
    headings = ("Layer", "Strongest pair", "Tokens together", "Expected", "Status")
    return Figure(
        name="pairs",
        title="The strongest pairs",
        label="",
        data=_pair_traces(selection),
        layout={
            "barmode": "stack",
            "bargap": 0.3,
            "xaxis": {"title": {"text": "tokens that both serve"}, "rangemode": "tozero"},
            "yaxis": {"type": "category", "title": {"text": ""}, "showgrid": False, "ticks": "", "dtick": 1},
        },
        height=440,
        legend=_pairs_legend(selection),
        states=tuple(states),
        choice="layer",
        table=Table("The strongest pair of every layer", headings, tuple(rows)),
        wide=False,
    )


def _order(layer: Meetings, kept: NDArray[np.bool_] | None) -> NDArray[np.integer]:
    """The experts to show: kept ones first, and in both groups those side by side that often meet."""
    busiest = np.argsort(-np.diag(layer.together), kind="stable")[:MOST_SHOWN]
    if kept is None:
        return neighbours(layer, busiest)
    groups = busiest[kept[busiest]], busiest[~kept[busiest]]
    return np.concatenate([neighbours(layer, group) for group in groups])


def _matrix_trace() -> dict[str, Any]:
    return {
        "type": "heatmap",
        "colorscale": [[0, "@less"], [0.5, "@neutral"], [1, "@more"]],
        "zmin": -3,
        "zmax": 3,
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "experts %{customdata[0]} and %{customdata[1]}<br>%{customdata[2]}<extra></extra>",
    }


def _matrix_label(layer: int, together: NDArray[np.float64], shown: int) -> str:
    rows, columns = np.triu_indices(len(together), 1)
    meet = together[rows, columns] > 0
    busiest = f" The {shown} busiest are shown." if shown < len(together) else ""
    return (
        f"Co-activation matrix of layer {layer}: {counted(float(meet.sum()), 'pair')} of {len(meet):,} serve at least "
        f"one token together.{busiest}"
    )


def _kept_border(kept: int, shown: int) -> dict[str, Any]:
    """Lines between kept and dropped experts."""
    if kept in (0, shown):
        return {"shapes": []}
    at, line = kept - 0.5, {"color": "@text", "width": 1.5}
    ends = {"type": "line", "line": line, "layer": "above"}
    return {
        "shapes": [
            {**ends, "x0": at, "x1": at, "y0": -0.5, "y1": shown - 0.5},
            {**ends, "y0": at, "y1": at, "x0": -0.5, "x1": shown - 0.5},
        ]
    }


def _statuses(selection: Selection | None) -> tuple[str, ...]:
    return ("both kept", "one kept", "none kept") if selection else ("pair",)


def _status(first: int, second: int, kept: set[int] | None) -> str:
    if kept is None:
        return "pair"
    return ("none kept", "one kept", "both kept")[(first in kept) + (second in kept)]


def _pairs_legend(selection: Selection | None) -> tuple[Swatch, ...]:
    kinds = zip(_statuses(selection), _PAIR_COLOURS, strict=False)
    expected = Swatch("expected by their traffic", "line-ns-open", ("text",))
    return (*(Swatch(name, "block", (colour[1:],)) for name, colour in kinds), expected)


def _pair_traces(selection: Selection | None) -> list[dict[str, Any]]:
    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "marker": {"color": _PAIR_COLOURS[i]},
            "hovertemplate": "experts %{y}: %{x:,.5~g} tokens, " + name + "<extra></extra>",
        }
        for i, name in enumerate(_statuses(selection))
    ]
    expected = {
        "type": "scatter",
        "mode": "markers",
        "name": "expected",
        "marker": {"symbol": "line-ns-open", "size": 14, "color": "@text", "line": {"width": 2}},
        "hovertemplate": "experts %{y}: %{x:,.3~g} tokens expected by their traffic<extra></extra>",
    }
    return [*bars, expected]
