"""Results of an evaluation: quality of several models, controls, benchmarks, memory and speed."""

from __future__ import annotations

from typing import Any

from shape_moe.evaluation.evaluated import Evaluated, Evaluation
from shape_moe.evaluation.faithfulness import Faithfulness
from shape_moe.evaluation.measures import Measured, worst_group
from shape_moe.reporting.figures.figure import Figure, State, Swatch, Table, number, plain, shortened, with_interval
from shape_moe.reporting.figures.metrics import METRICS, Metric, error_bars, is_wide, known_metrics, value_axis
from shape_moe.reporting.opening import short_name
from shape_moe.reporting.theme import SERIES
from shape_moe.units import size_unit

_SET_NAMES = {"task": "the task", "also": "other data"}
_SYMBOLS = {"task": "circle", "also": "circle-open"}
_ROW = 44
_ROOM = 1.25
"""The axis of bars goes on beyond the longest by this factor: there stands its number."""
_FOOTPRINT = (
    ("weights", "Weights", "bytes", "lower"),
    ("peak_bytes", "Peak memory", "bytes", "lower"),
    ("load_seconds", "Time to load", "s", "lower"),
    ("prefill_tokens_per_second", "Reading the prompt", "tokens/s", "higher"),
    ("decode_tokens_per_second", "Writing the answer", "tokens/s", "higher"),
)


def quality_figure(evaluation: Evaluation) -> Figure | None:
    """Every model's quality with intervals, one metric at a time; None when nothing was measured."""
    sets = list(dict.fromkeys(name for model in evaluation.models for name in model.sets))
    measured = [result for model in evaluation.models for result in model.sets.values()]
    metrics = known_metrics(measured)
    if not metrics:
        return None
    names = _axis_names([short_name(model.name) for model in evaluation.models])
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "orientation": "h",
            "name": plain(_SET_NAMES.get(name, name)),
            "y": names,
            "marker": {
                "color": SERIES[place % len(SERIES)],
                "size": 11,
                "symbol": _SYMBOLS.get(name, "square"),
                "line": {"width": 2, "color": SERIES[place % len(SERIES)]},
            },
            "hovertemplate": "%{y}: %{x:.4~g}<extra></extra>",
        }
        for place, name in enumerate(sets)
    ]
    return Figure(
        name="quality",
        title="Quality of every model",
        label="",
        data=data,
        layout={
            "yaxis": {"autorange": "reversed", "type": "category", "ticks": ""},
        },
        height=70 + _ROW * len(names),
        narrow=_narrow([model.name for model in evaluation.models]),
        legend=_legend(sets),
        states=tuple(_quality_state(metric, evaluation, sets) for metric in metrics),
        lines=("Bars are 95 % intervals.",),
        table=_quality_table(evaluation, metrics),
    )


def _quality_state(metric: Metric, evaluation: Evaluation, sets: list[str]) -> State:
    by_set = [[_of(metric, model, name) for model in evaluation.models] for name in sets]
    log = is_wide(estimate for estimates in by_set for estimate in estimates)
    patches: list[dict[str, Any]] = [
        {
            "x": [e.value if e else None for e in estimates],
            "error_x": error_bars(estimates, log=log),
        }
        for estimates in by_set
    ]
    layout = {"xaxis": value_axis([e for estimates in by_set for e in estimates], log=log)}
    told = [
        f"{model.name} {metric.text(model.sets[sets[0]])}"
        for model in evaluation.models
        if sets[0] in model.sets and metric.of(model.sets[sets[0]])
    ]
    return State(metric.title, f"{metric.line} {'; '.join(told)}.", patches, layout, lines=(metric.line,))


def _of(metric: Metric, model: Evaluated, name: str) -> Any:
    return metric.of(model.sets[name]) if name in model.sets else None


def _quality_table(evaluation: Evaluation, metrics: list[Metric]) -> Table:
    rows = tuple(
        (model.name, _SET_NAMES.get(name, name), *(metric.text(measured) for metric in metrics))
        for model in evaluation.models
        for name, measured in model.sets.items()
    )
    return Table("Quality with 95 % intervals", ("Model", "Set", *(metric.title for metric in metrics)), rows, 2)


def faithfulness_figure(result: Faithfulness, place: int = 1) -> Figure:
    """The selection beside selections that keep the worst, or random, experts; ``place`` counts such figures."""
    entries = [("as selected", result.kept), ("worst experts instead", result.inverted)]
    entries += [(f"random experts {count}", control) for count, control in enumerate(result.random, start=1)]
    metrics = known_metrics(measured for _, measured in entries) or [METRICS[0]]
    states = []
    for metric in metrics:
        estimates = [metric.of(measured) for _, measured in entries]
        log = is_wide(estimates)
        bars = {**error_bars(estimates, log=log), "color": "@muted"}
        patch = {"x": [e.value if e else None for e in estimates], "error_x": bars}
        told = "; ".join(f"{name} {metric.text(measured)}" for name, measured in entries)
        layout = {"xaxis": value_axis(estimates, log=log)}
        states.append(State(metric.title, f"{metric.line} {told}.", [patch], layout, lines=(metric.line,)))
    colours = ["@kept", "@mark", *["@muted"] * len(result.random)]
    rows = tuple((name, *(metric.text(measured) for metric in metrics)) for name, measured in entries)
    return Figure(
        name=f"faithfulness-{place}",
        title=f"{shortened(result.name)} against controls of the same size",
        label="",
        data=[
            {
                "type": "scatter",
                "mode": "markers",
                "y": [name for name, _ in entries],
                "marker": {"color": colours, "size": 11},
                "hovertemplate": "%{y}: %{x:.4~g}<extra></extra>",
            }
        ],
        layout={"yaxis": {"autorange": "reversed", "type": "category", "ticks": ""}},
        height=70 + _ROW * len(entries),
        states=tuple(states),
        lines=("All keep as many experts in every layer. Bars are 95 % intervals.",),
        table=Table("Controls, with 95 % intervals", ("Kept experts", *(m.title for m in metrics)), rows),
    )


def footprint_figures(evaluation: Evaluation) -> tuple[Figure, ...]:
    """Memory and speed of every model, one small figure per measure."""
    figures = []
    for key, title, unit, better in _FOOTPRINT:
        known = [(m, value) for m in evaluation.models if (value := _footprint(m, key)) is not None]
        if known:
            figures.append(_bars(f"footprint-{key.replace('_', '-')}", title, unit, better, known))
    return tuple(figures)


def _footprint(model: Evaluated, key: str) -> float | None:
    return model.size if key == "weights" else getattr(model.footprint, key, None)


def _bars(name: str, title: str, unit: str, better: str, values: list[tuple[Evaluated, float]]) -> Figure:
    divisor = 1.0
    if unit == "bytes":
        unit, divisor = size_unit(max(value for _, value in values))
    names = [model.name for model, _ in values]
    shown = [value / divisor for _, value in values]
    told = "; ".join(f"{model} {number(value)} {unit}" for model, value in zip(names, shown, strict=True))
    rows = tuple((model, number(value, 4)) for model, value in zip(names, shown, strict=True))
    return Figure(
        name=name,
        title=f"{title}, {unit}",
        label=f"Bars: {title.lower()} in {unit}, {better} is better. {told}.",
        data=[
            {
                "type": "bar",
                "orientation": "h",
                "x": shown,
                "y": _axis_names(names),
                "text": [number(value) for value in shown],
                "textposition": "outside",
                "textfont": {"color": "@text"},
                "cliponaxis": False,
                "marker": {"color": ["@dropped" if model.kind == "dense" else "@kept" for model, _ in values]},
                "hovertemplate": "%{y}: %{x:,.4~g} " + unit + "<extra></extra>",
            }
        ],
        layout={
            "xaxis": {"range": [0, _ROOM * (max(shown) or 1)]},
            "yaxis": {"autorange": "reversed", "type": "category", "ticks": "", "showgrid": False},
            "bargap": 0.35,
        },
        height=70 + _ROW * len(shown),
        narrow=_narrow(names),
        table=Table(f"{title}, {unit}", ("Model", unit), rows),
        wide=False,
    )


def result_tables(evaluation: Evaluation) -> tuple[Table, ...]:
    """Tables of benchmark tasks and of classes, where there are such."""
    tables = []
    rows = [
        (model.name, task, metric, with_interval(number(found.value), found))
        for model in evaluation.models
        for task, result in model.tasks.items()
        for metric, found in result.metrics.items()
    ]
    if rows:
        tables.append(
            Table("Benchmarks, with 95 % intervals", ("Model", "Task", "Metric", "Result"), tuple(rows), texts=3)
        )
    for model in evaluation.models:
        if (worst := worst_group(model.classes)) is not None:
            by_class = {name: Measured(group["quality"], group["change"]) for name, group in model.classes.items()}
            metrics = known_metrics(by_class.values())
            cells = tuple(
                (f"{name} (worst)" if name == worst[0] else name, *(metric.text(measured) for metric in metrics))
                for name, measured in by_class.items()
            )
            tables.append(
                Table(f"{model.name} by {evaluation.by}", (str(evaluation.by), *(m.title for m in metrics)), cells)
            )
    return tuple(tables)


def _legend(sets: list[str]) -> tuple[Swatch, ...]:
    if len(sets) < 2:
        return ()
    colours = [SERIES[place % len(SERIES)][1:] for place in range(len(sets))]
    return tuple(
        Swatch(_SET_NAMES.get(name, name), _SYMBOLS.get(name, "square"), (colour,))
        for name, colour in zip(sets, colours, strict=True)
    )


def _narrow(names: list[str]) -> dict[str, Any]:
    """Shorter names on a phone."""
    short = [plain(shortened(name, 15)) for name in names]
    return {"yaxis": {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": short}}


def _axis_names(names: list[str]) -> list[str]:
    """Names beside an axis: short, and all different (equal ones would share a row)."""
    short = [shortened(name) for name in names]
    return [plain(name if short.count(name) == 1 else f"{place + 1}: {name}") for place, name in enumerate(short)]
