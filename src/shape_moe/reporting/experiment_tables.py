"""An experiment's results as tables, from the JSON document alone: for Markdown, the terminal and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from shape_moe.reporting.experiment_metrics import Document, Figure, Metric, metrics_of
from shape_moe.reporting.published_figures import (
    Published,
    published_dense,
    published_in,
    published_told,
    where_it_lies,
)
from shape_moe.selection.method import read_routed
from shape_moe.units import named_share, readable_kl, readable_share, readable_size, share_as_option

EXPLANATION = (
    "Brackets hold 95 % intervals. Bold is the best value of a column, which says nothing about chance: where "
    "intervals overlap, more examples may change the order. Methods are compared at equal numbers of experts."
)

STARRED = EXPLANATION.replace("Bold is the best", "A star marks the best")
"""The same where nothing is bold."""


@dataclass(frozen=True)
class Cell:
    """One figure of a table.

    Attributes:
        text: as it is shown.
        value: the figure, None where there is none.
        best: whether it is the best one of its column.
    """

    text: str
    value: float | None
    best: bool

    @property
    def marked(self) -> str:
        """The text, with a star where the figure is the best one of its column."""
        return f"{self.text} *" if self.best else self.text


@dataclass(frozen=True)
class ExperimentTable:
    """One figure of all methods at all keep rates.

    Attributes:
        title: what it shows.
        headings: one per column.
        keep: the keep rates of the columns after the first.
        is_share: whether values are shares.
        rows: the dense model, then a row per method: its name, and a cell per keep rate.
    """

    title: str
    headings: tuple[str, ...]
    keep: tuple[float, ...]
    is_share: bool
    rows: tuple[tuple[Any, ...], ...]

    def markdown(self) -> list[str]:
        """As lines of Markdown."""
        body = [
            (name, *(f"**{cell.text}**" if cell.best else cell.text for cell in cells)) for name, *cells in self.rows
        ]
        head, *rest = [f"| {' | '.join(row)} |" for row in (self.headings, *body)]
        return [head, f"| --- |{' ---: |' * (len(self.headings) - 1)}", *rest]


@dataclass(frozen=True)
class ExperimentPart:
    """What one evaluation says of one model.

    Attributes:
        model: the model.
        evaluation: the evaluation.
        sizes: the model's sizes, a sentence.
        sample: what it was measured on.
        tables: one per figure, calibration and routing.
        model_first: whether this is the first part of its model.
    """

    model: str
    evaluation: str
    sizes: str
    sample: str
    tables: tuple[ExperimentTable, ...]
    model_first: bool


def experiment_markdown(document: Document) -> str:
    """The tables of an experiment: per model and evaluation, methods down and keep rates across.

    Args:
        document: the content of ``experiment.json``.
    """
    lines = ["# Experiment", "", experiment_preface(document), "", EXPLANATION.replace("Bold", "**Bold**")]
    for part in experiment_parts(document):
        if part.model_first:
            lines += ["", f"## {part.model}", "", part.sizes]
        lines += ["", f"### {part.model}: {part.evaluation}", "", part.sample]
        for table in part.tables:
            lines += ["", f"**{table.title}**", "", *table.markdown()]
    if reasons := experiment_gaps(document):
        lines += ["", "Not possible:", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def experiment_preface(document: Document) -> str:
    """What the figures rest on."""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    calibration = "; ".join(f"{entry['name']}: {entry['examples']} examples" for entry in document["calibration"])
    return f"Calibration: {calibration}. Seed {document['config']['seed']}; {versions}."


def experiment_gaps(document: Document) -> list[str]:
    """Why some cells are empty."""
    return list(dict.fromkeys(str(cell["reason"]) for cell in document["cells"] if cell["reason"]))


def experiment_parts(document: Document) -> list[ExperimentPart]:
    """The tables by model and evaluation, in the order of the document."""
    parts = []
    for model in document["models"]:
        for place, evaluation in enumerate(document["evaluation"]):
            dense = _dense(document, model["name"])["sets"][evaluation["name"]]
            tables = tuple(_tables(document, model["name"], evaluation, dense))
            sample = _sample(evaluation, dense)
            if not tables:
                sample += f" None of the figures asked for ({', '.join(evaluation['metrics'])}) is there."
            sizes = experiment_sizes(document, model["name"])
            parts.append(ExperimentPart(model["name"], evaluation["name"], sizes, sample, tables, place == 0))
    return parts


@dataclass(frozen=True)
class BestMethod:
    """What is best at one keep rate.

    Attributes:
        cells: evaluation, keep rate, method, and the first figure of the dense model and of this one.
        saved: the share of the weights that is gone, None where sizes are not known.
        options: how ``prune`` is told to do the same.
    """

    cells: tuple[str, ...]
    saved: float | None
    options: str


def experiment_bests(document: Document, model: str) -> list[BestMethod]:
    """The best method by evaluation and keep rate, where it was calibrated on what it is judged by."""
    found = []
    for part in experiment_parts(document):
        own = [table for table in part.tables if f"calibrated on {part.evaluation}," in table.title] or part.tables
        for table in own[:1] if part.model == model else ():
            dense = table.rows[0]
            for place, keep in enumerate(table.keep, start=1):
                rows = [row for row in table.rows[1:] if row[place].best] or [
                    row for row in table.rows[1:] if row[place].value is not None
                ]
                if rows:
                    found.append(_best(document, part, keep, rows, (dense[place].text, rows[0][place].text)))
    return found


def _best(
    document: Document, part: ExperimentPart, keep: float, rows: Sequence[tuple[Any, ...]], shown: tuple[str, str]
) -> BestMethod:
    name = str(rows[0][0]).partition(",")[0]
    scorer, _, rule = name.partition("/")
    others = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    sizes = [
        c["bytes"] for c in document["cells"] if c["model"] == part.model and c["keep_asked"] == keep and c["bytes"]
    ]
    dense = _dense(document, part.model)["bytes"]
    saved = 1 - max(sizes) / dense if sizes and dense else None
    routing, scale = read_routed(document["config"]["routings"][0])
    options = f"--keep {share_as_option(keep)} --scorer {scorer} --rule {rule} --routing {routing}"
    if scale != "survivors":
        options += f" --gate-scale {scale}"
    return BestMethod((part.evaluation, _share(keep), f"{name}{others}", *shown), saved, options)


def _dense(document: Document, model: str) -> Document:
    found: Document | None = next((entry for entry in document["dense"] if entry["model"] == model), None)
    if found is None:
        raise ValueError(f"there is no dense model {model} in it")
    return found


def whole_experiment(document: Document) -> Document:
    """The document, once it is sure that all that is shown of it is there.

    Raises:
        KeyError: when something is missing.
        TypeError: when something is of another kind.
        ValueError: likewise.
    """
    experiment_markdown(document)
    for model in document["models"]:
        experiment_bests(document, str(model["name"]))
    return document


def experiment_sizes(document: Document, model: str) -> str:
    """The model's sizes, a sentence."""
    dense = _dense(document, model)
    sizes: dict[float, int] = {}
    for cell in document["cells"]:
        if cell["model"] == model and cell["bytes"] is not None:
            sizes[cell["keep_asked"]] = max(cell["bytes"], sizes.get(cell["keep_asked"], 0))
    parts = [f"{readable_size(dense['bytes'])} dense"]
    parts += [f"{readable_size(size)} at keep {_share(keep)}" for keep, size in sizes.items()]
    return f"Weights: {', '.join(parts)}."


def _share(keep: float) -> str:
    """A keep rate as it was asked for."""
    return named_share(keep)


def _tables(document: Document, model: str, evaluation: Document, dense: Document) -> Iterator[ExperimentTable]:
    metrics = [metric for metric in metrics_of(evaluation, dense) if metric.of(dense) is not None]
    for calibration in evaluation["calibration"]:
        for routing in document["config"]["routings"]:
            cells = [
                cell
                for cell in document["cells"]
                if (cell["model"], cell["calibration"], cell["routing"]) == (model, calibration, routing)
            ]
            for metric in metrics:
                title = f"{metric.title}; calibrated on {calibration}, routing {routing}"
                table = _Table(
                    evaluation["name"],
                    metric,
                    document["config"]["keep"],
                    dense,
                    cells,
                    published_in(evaluation, model, metric.key, routing),
                )
                yield table.built(f"{title[0].upper()}{title[1:]}")


def _sample(evaluation: Document, dense: Document) -> str:
    if evaluation["kind"] == "task":
        items = ", ".join(f"{count} items of {task}" for task, count in dense["items"].items())
        few = "" if evaluation["fewshot"] is None else f", {evaluation['fewshot']} examples in the prompt"
        told = f"lm-evaluation-harness: {items}{few}. Whether calibration has seen them is not checked."
        return told + published_told(evaluation)
    answered = f"; {dense['generated']} of them answered freely" if dense["generated"] else ""
    return f"n = {dense['examples']}: {evaluation['sentence']}{answered}.{published_told(evaluation)}"


class _Table:
    """One table: the dense model on top, a row per method, the best of every column in bold.

    What others have published stands behind the figure, with whether it lies inside the figure's interval.
    """

    def __init__(
        self,
        evaluation: str,
        metric: Metric,
        keep: Sequence[float],
        dense: Document,
        cells: Iterable[Document],
        published: Published,
    ) -> None:
        self.evaluation, self.metric, self.keep, self.dense = evaluation, metric, keep, dense
        self.published = published
        self.rows: dict[str, dict[float, list[Document]]] = {}
        for cell in cells:
            row = self.rows.setdefault(f"{cell['scorer']}/{cell['rule']}", {})
            row.setdefault(cell["keep_asked"], []).append(cell)

    def built(self, title: str) -> ExperimentTable:
        best = {keep: self._best(keep) for keep in self.keep}
        dense = self.metric.of(self.dense)
        assert dense is not None
        text = self._figure(dense) + self._beside(published_dense(self.published), [dense])
        rows = [("dense", *[Cell(text, _number(dense), False)] * len(self.keep))]
        for method, row in self.rows.items():
            seeds = max(len(cells) for cells in row.values())
            name = f"{method}, mean of {seeds} seeds" if seeds > 1 else method
            entries = [(row.get(keep, []), best[keep], self.published.get((method, keep))) for keep in self.keep]
            rows.append((name, *(self._entry(*entry) for entry in entries)))
        headings = ("method", *(f"keep {_share(keep)}" for keep in self.keep))
        return ExperimentTable(title, headings, tuple(self.keep), self.metric.is_share, tuple(rows))

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

    def _entry(self, cells: Sequence[Document], best: float | None, published: float | None) -> Cell:
        found, value = self._found(cells), self._value(cells)
        if value is None:
            return Cell("not possible" if any(cell["reason"] for cell in cells) else "", None, False)
        if len(found) == 1:
            text = self._figure(found[0])
        else:
            values = [figure["value"] for figure in found]
            low, high = (self._number(end).removesuffix(" %") for end in (min(values), max(values)))
            text = f"{self._number(value)} ({low} to {high})"
        return Cell(text + self._beside(published, found), value, value == best)

    def _beside(self, published: float | None, found: Sequence[Figure]) -> str:
        if published is None:
            return ""
        return f"; published {self._number(published)}: {where_it_lies(published, found)}"

    def _figure(self, figure: Figure) -> str:
        text = self._number(figure["value"])
        if figure["low"] is None:
            return text
        low, high = (self._number(figure[end]).removesuffix(" %") for end in ("low", "high"))
        return text if text.removesuffix(" %") == low == high else f"{text} [{low}, {high}]"

    def _number(self, value: float) -> str:
        if self.metric.key == "kl" and self.metric.task is None:
            return readable_kl(value) if value else "0"
        return readable_share(value) if self.metric.is_share else f"{value:z.4f}"


def _number(figure: Figure) -> float:
    return float(figure["value"])
