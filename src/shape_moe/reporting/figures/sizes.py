"""Quality over size where no sweep was run: the models of an evaluation, an experiment, or the demonstration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shape_moe.evaluation.evaluated import TASK, Evaluated, Evaluation
from shape_moe.reporting.demo_rows import demo_levels, is_control
from shape_moe.reporting.experiment_tables import ExperimentPart
from shape_moe.reporting.figures.figure import Figure, State, Swatch, in_template, plain, shortened
from shape_moe.reporting.figures.metrics import error_bars, is_wide, known_metrics, value_axis
from shape_moe.reporting.theme import SERIES
from shape_moe.units import readable_share, readable_size, size_unit

_SYMBOLS = ("circle", "square", "triangle-up", "pentagon", "star", "hexagon")
_TOP = 108
"""Where an axis of per cent ends, so that points at 100 % and their labels are whole."""


def mark(place: int) -> tuple[str, str]:
    """Symbol and colour of a line: no two of 36 have both in common."""
    colour = place % len(SERIES)
    return _SYMBOLS[(colour + place // len(SERIES)) % len(_SYMBOLS)], SERIES[colour]


def evaluation_size_figure(evaluation: Evaluation) -> Figure | None:
    """The models of an evaluation by size; None where fewer than two sizes are known."""
    models = [model for model in evaluation.models if model.size is not None and TASK in model.sets]
    metrics = known_metrics(model.sets[TASK] for model in models)
    if len(models) < 2 or not metrics:
        return None
    unit, divisor = size_unit(max(model.size or 0 for model in models))
    sizes = [(model.size or 0) / divisor for model in models]
    trace = {
        "type": "scatter",
        "mode": "markers+text",
        "x": sizes,
        "text": [f"\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}{plain(_point(model))}" for model in models],
        "textposition": "middle right",
        "cliponaxis": False,
        "textfont": {"color": "@text"},
        "marker": {
            "size": 11,
            "color": ["@text" if model.kind == "dense" else "@kept" for model in models],
            "symbol": ["diamond" if model.kind == "dense" else "circle" for model in models],
        },
        "hovertemplate": "%{text}<br>%{x:.4~g} " + unit + "<br>%{y:.4~g}<extra></extra>",
    }
    states = []
    for metric in metrics:
        found = [metric.of(model.sets[TASK]) for model in models]
        log = is_wide(found)
        dense = [value if value is not None else metric.dense for value in (e.value if e else None for e in found)]
        patch = {"y": dense, "error_y": error_bars(found, log=log)}
        told = "; ".join(f"{m.name} {metric.text(m.sets[TASK])}" for m in models)
        states.append(
            State(
                metric.title,
                f"{metric.title} against size. {told}.",
                [patch],
                {"yaxis": value_axis(found, log=log)},
                lines=(metric.line,),
            )
        )
    room = 0.12 * (max(sizes) - min(sizes) or max(sizes))
    axis = {"title": {"text": f"weights, {unit}"}, "range": [min(sizes) - room, max(sizes) + 2 * room]}
    return Figure(
        name="sizes",
        title="Quality against size",
        label="",
        data=[trace],
        layout={"xaxis": axis, "hovermode": "closest"},
        height=360,
        states=tuple(states),
        legend=(Swatch("pruned", "circle", ("kept",)), Swatch("dense model", "diamond", ("text",))),
        lines=("Bars are 95 % intervals.",),
    )


def _point(model: Evaluated) -> str:
    """The keep rate of a model, and its name where that is short."""
    if model.kind == "dense":
        return "dense"
    name = shortened(model.name.rstrip("/").rsplit("/", 1)[-1], 14)
    return name if model.selection is None else f"{readable_share(model.selection.keep)} ({name})"


def experiment_figure(part: ExperimentPart, place: int) -> Figure:
    """Every method's figures over keep rates, one view per table; ``place`` tells such figures apart."""
    names = list(dict.fromkeys(str(name) for table in part.tables for name, *_ in table.rows))
    keep = sorted({rate for table in part.tables for rate in table.keep})
    data = [_method_line(name, at, [100 * rate for rate in keep]) for at, name in enumerate(names)]
    states = []
    for table in part.tables:
        rows = {name: dict(zip(table.keep, cells, strict=True)) for name, *cells in table.rows}
        factor = 100 if table.is_share else 1
        patches = [
            {"y": [_value(rows.get(name, {}).get(rate), factor) for rate in keep], "visible": name in rows}
            for name in names
        ]
        axis: dict[str, Any] = {"title": {"text": "%" if table.is_share else ""}}
        axis |= {"range": [0, _TOP]} if table.is_share else {"rangemode": "tozero"}
        states.append(
            State(
                _view(table.title, part),
                f"{table.title}, by keep rate.",
                patches,
                {"yaxis": axis},
                lines=(f"{table.title}.",),
            )
        )
    return Figure(
        name=f"experiment-{place}",
        title=f"{part.model}: {part.evaluation}",
        label="",
        data=data,
        layout={
            "xaxis": {"title": {"text": "experts kept, %"}, "tickvals": [100 * rate for rate in keep]},
            "hovermode": "closest",
        },
        height=380,
        states=tuple(states),
        legend=tuple(
            Swatch(name, mark(at)[0], (mark(at)[1][1:],), lined=True) if name != "dense" else _DENSE
            for at, name in enumerate(names)
        ),
    )


_DENSE = Swatch("dense model", "line", ("text",))


def _view(title: str, part: ExperimentPart) -> str:
    """A short name of a table: its figure, and its calibration where that differs."""
    figure, _, how = title.partition(" (")
    calibrated = how.partition("; ")[2].removeprefix("calibrated on ")
    several = len({table.title.partition("; ")[2] for table in part.tables}) > 1
    return f"{figure.partition(',')[0]} ({calibrated})" if several else figure.partition(",")[0]


def _value(cell: Any, factor: float) -> float | None:
    return None if cell is None or cell.value is None else factor * cell.value


def _method_line(name: str, place: int, keep: list[float]) -> dict[str, Any]:
    symbol, colour = mark(place)
    dense = name == "dense"
    return {
        "type": "scatter",
        "mode": "lines" if dense else "lines+markers",
        "name": plain(name),
        "x": keep,
        "connectgaps": True,
        "cliponaxis": False,
        "line": {"color": "@text" if dense else colour, "width": 2, **({"dash": "dash"} if dense else {})},
        "marker": {"color": colour, "size": 9, "symbol": symbol},
        "hovertemplate": in_template(name) + ", keeps %{x:.3~g} %: %{y:.4~g}<extra></extra>",
    }


def demo_figure(document: Mapping[str, Any]) -> Figure:
    """What every scorer keeps of the task, and of the other tasks, by keep rate."""
    levels = sorted(demo_levels(document), key=lambda level: level[0])
    names = list(dict.fromkeys(str(row["scorer"]) for _, rows in levels for row in rows if not is_control(row)))
    keep = [100 * rate for rate, _ in levels]
    data = [_method_line(name, at, keep) for at, name in enumerate(names)]
    states = []
    for title, key in ((str(document["task"]), "on_task"), ("the other tasks", "off_task")):
        by_rate = [{str(row["scorer"]): float(row[key]) for row in rows} for _, rows in levels]
        patches = [{"y": [100 * rates[name] if name in rates else None for rates in by_rate]} for name in names]
        line = f"Exact match on {title}, % of held-out prompts; higher is better."
        states.append(State(title, line, patches, {"yaxis": {"range": [0, _TOP]}}, lines=(line,)))
    sizes = "; ".join(f"{readable_share(rate)}: {readable_size(rows[0]['size'])}" for rate, rows in levels if rows)
    return Figure(
        name="demo",
        title="Quality against size",
        label="",
        data=data,
        layout={
            "xaxis": {"title": {"text": "experts kept, %"}, "tickvals": [round(rate) for rate in keep]},
            "hovermode": "closest",
        },
        height=380,
        states=tuple(states),
        legend=tuple(Swatch(name, mark(at)[0], (mark(at)[1][1:],), lined=True) for at, name in enumerate(names)),
        lines=(f"Weights by experts kept: {sizes}.",),
    )
