"""Quality over size: what every selection of a sweep costs, and which one is recommended."""

from __future__ import annotations

from typing import Any

from shape_moe.evaluation.keep_rate import SweptPoint
from shape_moe.evaluation.swept import Sweep
from shape_moe.reporting.figures.figure import Figure, State, Swatch, Table, in_template, plain
from shape_moe.reporting.figures.metrics import METRICS, Metric, error_bars, is_wide, known_metrics, value_axis
from shape_moe.reporting.figures.sizes import mark
from shape_moe.selection.selection import Selection
from shape_moe.units import NONE, named_share, percent, readable_size, size_unit

_LABELLED = 2
"""With more lines, keep rates stand on the first ones only: elsewhere labels would cover each other."""


def sweep_figure(sweep: Sweep, selection: Selection | None) -> Figure:
    """Quality against size, one line per method, with the operating point."""
    methods = list(dict.fromkeys(str(point.method) for point in sweep.points))
    groups = [sorted((p for p in sweep.points if str(p.method) == method), key=lambda p: p.kept) for method in methods]
    axis = _SizeAxis(sweep)
    chosen = sweep.point_of(selection)
    data = [_line(i, group, axis) for i, group in enumerate(groups)]
    data += [_ring(chosen, axis), _dense_trace(axis)]
    metrics = known_metrics(point.measured for point in sweep.points) or [METRICS[0]]
    return Figure(
        name="sweep",
        title="Quality against size",
        label="",
        data=data,
        layout={
            "xaxis": {"title": {"text": axis.title}},
            "hovermode": "closest",
        },
        height=430,
        states=tuple(_state(metric, sweep, groups, chosen) for metric in metrics),
        legend=(*_legend(methods, axis, chosen, given=selection is not None), *_limit_swatch(sweep)),
        lines=(
            "Numbers on the points are the share of experts kept; bars are 95 % intervals. A hollow point is beyond "
            "the limit, gives answers that loop or do not end, or does not fit the memory.",
        ),
        table=_table(sweep, metrics),
    )


class _SizeAxis:
    """Where points stand on the horizontal axis: at their bytes, or at their keep rate where bytes are unknown."""

    def __init__(self, sweep: Sweep) -> None:
        sizes = [point.size for point in sweep.points]
        self.by_size = None not in sizes and bool(sizes)
        largest = max([size or 0 for size in sizes] + [sweep.dense_size or 0])
        self.unit, self.divisor = size_unit(largest)
        self.title = f"weights, {self.unit}" if self.by_size else "experts kept, %"
        self.dense = (sweep.dense_size / self.divisor if sweep.dense_size else None) if self.by_size else 100.0

    def at(self, point: SweptPoint) -> float:
        return (point.size or 0) / self.divisor if self.by_size else 100 * point.keep


def _line(place: int, group: list[SweptPoint], axis: _SizeAxis) -> dict[str, Any]:
    symbol, colour = mark(place)
    return {
        "type": "scatter",
        "mode": "lines+markers+text" if place < _LABELLED else "lines+markers",
        "text": [_rate(point) for point in group],
        "textposition": "top right" if place == 0 else "bottom left",
        "textfont": {"color": colour, "size": 11},
        "cliponaxis": False,
        "name": plain(group[0].method),
        "x": [axis.at(point) for point in group],
        "line": {"color": colour, "width": 2},
        "marker": {
            "color": colour,
            "size": 9,
            "symbol": [symbol if point.good else f"{symbol}-open" for point in group],
            "line": {"width": 2, "color": colour},
        },
        "customdata": [[percent(point.keep), _size(point)] for point in group],
        "hovertemplate": in_template(group[0].method)
        + ", keeps %{customdata[0]}<br>%{customdata[1]}<br>%{y:.4~g}<extra></extra>",
    }


def _rate(point: SweptPoint) -> str:
    return named_share(round(point.keep, 2))


def _size(point: SweptPoint) -> str:
    return readable_size(point.size) if point.size is not None else f"{point.kept:,} experts"


def _legend(methods: list[str], axis: _SizeAxis, chosen: SweptPoint | None, *, given: bool) -> tuple[Swatch, ...]:
    marks = [mark(i) for i in range(len(methods))]
    found = [
        Swatch(method, symbol, (colour[1:],), lined=True)
        for method, (symbol, colour) in zip(methods, marks, strict=True)
    ]
    if chosen is not None:
        found.append(Swatch("this selection" if given else "recommended", "circle-open", ("text",)))
    if axis.dense is not None:
        found.append(Swatch("dense model", "diamond", ("text",)))
    return tuple(found)


def _ring(chosen: SweptPoint | None, axis: _SizeAxis) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [axis.at(chosen)] if chosen else [],
        "marker": {"symbol": "circle-open", "size": 22, "color": "@text", "line": {"width": 2.5}},
        "hoverinfo": "skip",
    }


def _dense_trace(axis: _SizeAxis) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "dense model",
        "x": [axis.dense] if axis.dense is not None else [],
        "marker": {"symbol": "diamond", "size": 11, "color": "@text"},
        "hovertemplate": "dense model<br>%{y:.4~g}<extra></extra>",
    }


def _state(metric: Metric, sweep: Sweep, groups: list[list[SweptPoint]], chosen: SweptPoint | None) -> State:
    estimates = [[metric.of(point.measured) for point in group] for group in groups]
    log = is_wide(estimate for group in estimates for estimate in group)
    dense = metric.of_dense(sweep.dense)
    patches: list[dict[str, Any]] = [
        {"y": [e.value if e else None for e in group], "error_y": error_bars(group, log=log)} for group in estimates
    ]
    ringed = metric.of(chosen.measured) if chosen else None
    patches.append({"y": [ringed.value] if ringed else []})
    patches.append({"y": [dense] if dense is not None and not (log and dense <= 0) else []})
    limit = _limit(metric, sweep, dense)
    layout = {
        "yaxis": value_axis([estimate for group in estimates for estimate in group], log=log),
        "shapes": _limit_shape(limit, log=log),
    }
    return State(metric.title, _label(metric, sweep, chosen), patches, layout, lines=(metric.line,))


def _limit(metric: Metric, sweep: Sweep, dense: float | None) -> float | None:
    limit, place = sweep.limit, (metric.group, metric.key)
    if limit is not None and limit.kind == "max_kl" and place == ("quality", "kl"):
        return limit.value
    if limit is not None and limit.kind == "max_drop" and place == ("quality", "exact_match") and dense is not None:
        return dense - 100 * limit.value
    return None


def _limit_swatch(sweep: Sweep) -> tuple[Swatch, ...]:
    return (Swatch(f"limit: {sweep.limit}", "line", ("mark",)),) if sweep.limit is not None else ()


def _limit_shape(limit: float | None, *, log: bool) -> list[dict[str, Any]]:
    if limit is None or (log and limit <= 0):
        return []
    line = {"color": "@mark", "width": 1.5, "dash": "dash"}
    return [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit, "line": line}]


def _label(metric: Metric, sweep: Sweep, chosen: SweptPoint | None) -> str:
    text = f"{metric.title} against size for {len(sweep.points)} selections; {metric.better} is better."
    if chosen is not None:
        text += f" The marked one keeps {percent(chosen.keep)} of the experts: {metric.text(chosen.measured)}."
    return text


def _table(sweep: Sweep, metrics: list[Metric]) -> Table:
    marks = {True: "yes", False: "no", None: NONE}
    rows = []
    for place, point in enumerate(sweep.points):
        name = str(point.method) + (" (recommended)" if place == sweep.recommended else "")
        size = readable_size(point.size) if point.size is not None else NONE
        cells = (name, percent(point.keep), size, *(metric.text(point.measured) for metric in metrics))
        rows.append((*cells, marks[point.meets], marks[point.healthy], marks[point.fits]))
    dense_size = readable_size(sweep.dense_size) if sweep.dense_size is not None else NONE
    rows.append(("dense model", percent(1.0), dense_size, *(_dense_text(m, sweep) for m in metrics), NONE, NONE, NONE))
    headings = (
        "Selection",
        "Kept",
        "Weights",
        *(metric.title for metric in metrics),
        "Within limit",
        "Healthy",
        "Fits",
    )
    return Table("Every selection of the sweep, with 95 % intervals", headings, tuple(rows))


def _dense_text(metric: Metric, sweep: Sweep) -> str:
    return metric.text(sweep.dense) if metric.dense is None else metric.shown(metric.dense)
