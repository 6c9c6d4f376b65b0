"""An experiment's results as Markdown tables, from the JSON document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from shape_moe.units import readable_size

GENERATED = "generated_exact_match"
EXAMPLE_METRICS = ("exact_match", GENERATED, "nll", "perplexity", "kl", "top1")
"""Figures of an evaluation by examples that a table can show."""
_TITLES = {
    "exact_match": "exact match, teacher-forced",
    GENERATED: "exact match of free answers",
    "nll": "negative log-likelihood, nats per token",
    "perplexity": "perplexity",
    "kl": "KL divergence to the dense model, nats per token",
    "top1": "same most likely token as the dense model",
}
_SHARES = ("exact_match", GENERATED, "top1")
_SMALLER_IS_BETTER = ("nll", "perplexity", "kl", "bits_per_byte", "brier", "ter", "wer", "cer", "mse", "mae")

Document = Mapping[str, Any]
Figure = Mapping[str, Any]
"""``value``, ``low`` and ``high``, of which the ends may be null."""


@dataclass(frozen=True)
class _Metric:
    """A figure of one evaluation: its key, and of lm-eval's figures the task."""

    key: str
    task: str | None = None

    @property
    def smaller_is_better(self) -> bool:
        name = self.key.partition(",")[0]
        return name in _SMALLER_IS_BETTER or name.endswith(("perplexity", "_loss"))

    @property
    def is_share(self) -> bool:
        return self.task is None and self.key in _SHARES

    @property
    def title(self) -> str:
        name = _TITLES[self.key] if self.task is None else f"{self.task}: {self.key}"
        return f"{name} ({'smaller' if self.smaller_is_better else 'larger'} is better)"

    def of(self, figures: Document | None) -> Figure | None:
        """The figure in what an evaluation found out, None where it is not there."""
        if figures is None:
            return None
        if self.task is not None:
            found = figures["tasks"].get(self.task, {}).get(self.key)
        elif self.key == GENERATED:
            found = (figures["generation"] or {}).get("exact_match")
        else:
            found = figures["quality"].get(self.key)
        return found if found is None or found["value"] is not None else None


def experiment_markdown(document: Document) -> str:
    """The tables of an experiment: per model and evaluation, methods down and keep rates across.

    Args:
        document: the content of ``experiment.json``.
    """
    lines = ["# Experiment", "", *_preface(document)]
    for model in document["models"]:
        lines += ["", f"## {model['name']}", "", *_sizes(document, model["name"])]
        for evaluation in document["evaluation"]:
            lines += ["", f"### {model['name']}: {evaluation['name']}", ""]
            lines += _evaluation(document, model["name"], evaluation)
    return "\n".join([*lines, *_impossible(document)]) + "\n"


def _preface(document: Document) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    calibration = "; ".join(f"{entry['name']}: {entry['examples']} examples" for entry in document["calibration"])
    return [
        f"Calibration: {calibration}. Seed {document['config']['seed']}; {versions}.",
        "",
        "Brackets hold 95 % intervals. **Bold** is the best value of a column, which says nothing about chance: where "
        "intervals overlap, more examples may change the order. Methods are compared at equal numbers of experts.",
    ]


def _sizes(document: Document, model: str) -> list[str]:
    dense = next(entry for entry in document["dense"] if entry["model"] == model)
    sizes: dict[float, int] = {}
    for cell in document["cells"]:
        if cell["model"] == model and cell["bytes"] is not None:
            sizes[cell["keep_asked"]] = max(cell["bytes"], sizes.get(cell["keep_asked"], 0))
    parts = [f"{readable_size(dense['bytes'])} dense"]
    parts += [f"{readable_size(size)} at keep {keep:g}" for keep, size in sizes.items()]
    return [f"Weights: {', '.join(parts)}."]


def _evaluation(document: Document, model: str, evaluation: Document) -> list[str]:
    dense = next(entry for entry in document["dense"] if entry["model"] == model)["sets"][evaluation["name"]]
    lines = [_sample(evaluation, dense)]
    metrics = [metric for metric in _metrics(evaluation, dense) if metric.of(dense) is not None]
    if not metrics:
        lines += ["", f"None of the figures asked for ({', '.join(evaluation['metrics'])}) is there."]
    for calibration in evaluation["calibration"]:
        for routing in document["config"]["routings"]:
            cells = [
                cell
                for cell in document["cells"]
                if (cell["model"], cell["calibration"], cell["routing"]) == (model, calibration, routing)
            ]
            for metric in metrics:
                title = f"{metric.title}; calibrated on {calibration}, routing {routing}"
                table = _Table(evaluation["name"], metric, document["config"]["keep"], dense, cells)
                lines += ["", f"**{title[0].upper()}{title[1:]}**", "", *table.lines()]
    return lines


def _sample(evaluation: Document, dense: Document) -> str:
    if evaluation["kind"] == "task":
        items = ", ".join(f"{count} items of {task}" for task, count in dense["items"].items())
        few = "" if evaluation["fewshot"] is None else f", {evaluation['fewshot']} examples in the prompt"
        return f"lm-evaluation-harness: {items}{few}. Whether calibration has seen them is not checked."
    answered = f"; {dense['generated']} of them answered freely" if dense["generated"] else ""
    return f"n = {dense['examples']}: {evaluation['sentence']}{answered}."


def _metrics(evaluation: Document, dense: Document) -> list[_Metric]:
    if evaluation["kind"] == "examples":
        return [_Metric(key) for key in evaluation["metrics"]]
    tasks = {task: figures for task, figures in dense["tasks"].items() if task == evaluation["task"]} or dense["tasks"]
    return [
        _Metric(key, task)
        for task, figures in tasks.items()
        for key in figures
        if not evaluation["metrics"] or key in evaluation["metrics"]
    ]


class _Table:
    """One table: the dense model on top, a row per method, the best of every column in bold."""

    def __init__(
        self, evaluation: str, metric: _Metric, keep: Sequence[float], dense: Document, cells: Iterable[Document]
    ) -> None:
        self.evaluation, self.metric, self.keep, self.dense = evaluation, metric, keep, dense
        self.rows: dict[str, dict[float, list[Document]]] = {}
        for cell in cells:
            row = self.rows.setdefault(f"{cell['scorer']}/{cell['rule']}", {})
            row.setdefault(cell["keep_asked"], []).append(cell)

    def lines(self) -> list[str]:
        best = {keep: self._best(keep) for keep in self.keep}
        dense = self.metric.of(self.dense)
        assert dense is not None
        table = [
            ["method", *(f"keep {keep:g}" for keep in self.keep)],
            ["dense", *[self._figure(dense)] * len(self.keep)],
        ]
        for method, row in self.rows.items():
            seeds = max(len(cells) for cells in row.values())
            name = f"{method}, mean of {seeds} seeds" if seeds > 1 else method
            table.append([name, *(self._entry(row.get(keep, []), best[keep]) for keep in self.keep)])
        head, *body = [f"| {' | '.join(row)} |" for row in table]
        return [head, f"| --- |{' ---: |' * len(self.keep)}", *body]

    def _found(self, cells: Iterable[Document]) -> list[Figure]:
        figures = (self.metric.of(cell["sets"].get(self.evaluation)) for cell in cells)
        return [figure for figure in figures if figure is not None]

    def _value(self, cells: Iterable[Document]) -> float | None:
        """What is compared: the figure, the mean of several seeds."""
        found = [figure["value"] for figure in self._found(cells)]
        return fmean(found) if found else None

    def _best(self, keep: float) -> float | None:
        values = [self._value(row.get(keep, [])) for row in self.rows.values()]
        pick: Callable[[list[float]], float] = min if self.metric.smaller_is_better else max
        known = [value for value in values if value is not None]
        return pick(known) if len(known) > 1 else None

    def _entry(self, cells: Sequence[Document], best: float | None) -> str:
        found, value = self._found(cells), self._value(cells)
        if value is None:
            return "not possible" if any(cell["reason"] for cell in cells) else ""
        if len(found) == 1:
            text = self._figure(found[0])
        else:
            values = [figure["value"] for figure in found]
            text = f"{self._number(value)} ({self._number(min(values))} to {self._number(max(values))})"
        return f"**{text}**" if value == best else text

    def _figure(self, figure: Figure) -> str:
        if figure["low"] is None:
            return self._number(figure["value"])
        return f"{self._number(figure['value'])} [{self._number(figure['low'])}, {self._number(figure['high'])}]"

    def _number(self, value: float) -> str:
        return f"{100 * value:z.1f} %" if self.metric.is_share else f"{value:z.4f}"


def _impossible(document: Document) -> list[str]:
    reasons = dict.fromkeys(cell["reason"] for cell in document["cells"] if cell["reason"])
    return ["", "Not possible:", "", *(f"- {reason}" for reason in reasons)] if reasons else []
