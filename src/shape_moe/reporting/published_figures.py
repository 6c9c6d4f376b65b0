"""Figures that others have published for an experiment's evaluation, beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shape_moe.reporting.experiment_metrics import Document, Figure, Metric, metrics_of

DENSE = "dense"
Published = Mapping[tuple[str, float | None], float]
"""Shares by method, spelled ``scorer/rule``, and keep rate; those of the dense model by ``dense`` and None."""


def published_in(evaluation: Document, model: str, metric: str, routing: str) -> Published:
    """What was published of one model, where it is this figure that corresponds to it.

    Args:
        evaluation: an evaluation as the document describes it.
        model: the model's name.
        metric: key of the figure.
        routing: how tokens are routed, as :attr:`shape_moe.selection.method.Method.routed` spells it.
    """
    told = evaluation.get("published")
    if not told or told["metric"] != metric or told["routing"] != routing:
        return {}
    found: dict[tuple[str, float | None], float] = {}
    for method, given in (told["percent"].get(model) or {}).items():
        if isinstance(given, Mapping):
            found |= {(method, float(keep)): percent / 100 for keep, percent in given.items()}
        else:
            found[method, None] = given / 100
    return found


def published_dense(published: Published) -> float | None:
    """What was published of the dense model."""
    return published.get((DENSE, None))


def published_told(evaluation: Document) -> str:
    """Where published figures are from and how their stack differs, sentences with a space before; else empty."""
    told = evaluation.get("published")
    if not told:
        return ""
    source = f" Published figures: {told['source']}." if told["source"] else ""
    differences = f" Known differences of their stack: {'; '.join(told['differences'])}." if told["differences"] else ""
    return source + differences


def where_it_lies(published: float, found: Sequence[Figure]) -> str:
    """``inside`` or ``outside`` the interval of a figure; several seeds' figures span from lowest to highest end.

    A figure without an interval is ``equal`` or ``different``.
    """
    ends = [(figure["low"], figure["high"]) for figure in found]
    if any(low is None or high is None for low, high in ends):
        return "equal" if any(figure["value"] == published for figure in found) else "different"
    return "inside" if min(low for low, _ in ends) <= published <= max(high for _, high in ends) else "outside"


def published_rows(document: Document) -> list[dict[str, Any]]:
    """Every published figure that the experiment has one of its own for, with both.

    Args:
        document: the content of ``experiment.json``, as far as models, evaluations and cells go.
    """
    rows = []
    for model in document["dense"]:
        for evaluation in document["evaluation"]:
            metric = _compared(evaluation, model["sets"][evaluation["name"]])
            if metric is None:
                continue
            dense = model["sets"][evaluation["name"]]
            place = {"model": model["model"], "evaluation": evaluation["name"], "metric": metric.key}
            told = published_in(evaluation, model["model"], metric.key, evaluation["published"]["routing"])
            rows += _row(place, DENSE, None, published_dense(told), metric.of(dense))
            for cell in document["cells"]:
                method = f"{cell['scorer']}/{cell['rule']}"
                same = (cell["model"], cell["routing"]) == (model["model"], evaluation["published"]["routing"])
                percent = told.get((method, cell["keep_asked"])) if same else None
                own = {**place, "calibration": cell["calibration"], "seed": cell["seed"]}
                rows += _row(own, method, cell["keep_asked"], percent, metric.of(cell["sets"].get(evaluation["name"])))
    return rows


def _compared(evaluation: Document, dense: Document) -> Metric | None:
    """The figure that published ones are compared with, None where nothing was published or it is not there."""
    if not evaluation.get("published"):
        return None
    wanted = evaluation["published"]["metric"]
    found = [metric for metric in metrics_of(evaluation, dense) if metric.key == wanted]
    return found[0] if found and found[0].of(dense) is not None else None


def _row(
    place: Mapping[str, Any], method: str, keep: float | None, published: float | None, figure: Figure | None
) -> list[dict[str, Any]]:
    if published is None or figure is None:
        return []
    ends = {key: figure[key] for key in ("value", "low", "high")}
    return [
        {
            **place,
            "method": method,
            "keep": keep,
            "published": published,
            **ends,
            "lies": where_it_lies(published, [figure]),
        }
    ]
