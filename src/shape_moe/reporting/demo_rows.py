"""What a demonstration shows, from its document alone: for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shape_moe.units import NONE, named_share, readable_share, readable_size

Document = Mapping[str, Any]
Row = Mapping[str, Any]
PUBLISHED = "shape"
"""The scorer of the published method."""
CONTROLS = ("dense", "random")
_INVERTED = "inverted"
_SLACK = 0.02
"""A fall that counts as keeping the task."""


def demo_levels(document: Document) -> list[tuple[float, list[Row]]]:
    """Keep rates with their rows, the best row first; controls (random, inverted values) come last."""
    levels: dict[float, list[Row]] = {}
    for row in document["rows"]:
        if row["scorer"] != "dense":
            levels.setdefault(round(float(row["keep"]), 2), []).append(row)
    return [(keep, sorted(rows, key=_rank)) for keep, rows in levels.items()]


def is_control(row: Row) -> bool:
    """Whether the row is there for comparison only."""
    return row["scorer"] in CONTROLS or _INVERTED in str(row["scorer"])


def _rank(row: Row) -> tuple[bool, float, float, str]:
    return is_control(row), -float(row["on_task"]), -float(row["off_task"]), str(row["scorer"])


@dataclass(frozen=True)
class Best:
    """The smallest model that still does the task.

    Attributes:
        row: its row.
        dense: the unpruned model's.
    """

    row: Row
    dense: Row

    @property
    def saved(self) -> float:
        """The share of the weights that is gone."""
        return float(1 - self.row["size"] / self.dense["size"])

    @property
    def sizes(self) -> str:
        """Sizes before and after."""
        return f"{readable_size(self.dense['size'])} to {readable_size(self.row['size'])}"


def demo_best(document: Document) -> Best | None:
    """The smallest model within two points of the unpruned one on the task; of several the best off the task."""
    dense = _dense(document)
    good = [
        row
        for _, rows in demo_levels(document)
        for row in rows
        if not is_control(row) and row["on_task"] >= dense["on_task"] - _SLACK
    ]
    return Best(min(good, key=_smallest), dense) if good else None


def _smallest(row: Row) -> tuple[float, float, float, str]:
    return float(row["size"]), -float(row["on_task"]), -float(row["off_task"]), str(row["scorer"])


def demo_headline(document: Document) -> str:
    """How small the embedded model gets without losing the task, in a sentence."""
    best, task, model = demo_best(document), document["task"], demo_model(document)
    if best is None:
        return f"No method keeps {task} of {model} at these keep rates"
    before, after = (readable_share(float(row["on_task"])) for row in (best.dense, best.row))
    return (
        f"{readable_share(best.saved)} smaller ({best.sizes}), and {model} still does {task}: {after} right "
        f"({before} before), by the scorer {best.row['scorer']}"
    )


def demo_model(document: Document) -> str:
    """The model, with its size in layers and experts."""
    layers, experts = document.get("layers"), document.get("experts")
    return f"the embedded model ({layers} layers of {experts} experts)" if layers else "the embedded model"


def _dense(document: Document) -> Row:
    found: Row | None = next((row for row in document["rows"] if row["scorer"] == "dense"), None)
    if found is None or not found["size"] > 0:
        raise ValueError("there is no dense model in it")
    return found


def whole_demo(document: Document) -> Document:
    """The document, once it is sure that all that is shown of it is there.

    Raises:
        KeyError: when something is missing.
        TypeError: when something is of another kind.
        ValueError: likewise.
    """
    for show in (demo_headings, demo_short, demo_headline, demo_command):
        show(document)
    return document


def demo_headings(document: Document) -> tuple[str, ...]:
    """Of the short table."""
    published = f"by {PUBLISHED}/{document['rule']}"
    return "Best scorer", "Kept", "Weights", str(document["task"]), "Other tasks", f"{document['task']} {published}"


def demo_short(document: Document) -> list[tuple[str, ...]]:
    """The dense model, then at each keep rate the best scorer, with what the published one keeps of the task."""
    dense = _dense(document)
    found: list[tuple[str, ...]] = [("dense model", "100 %", *_cells(dense), _right(dense))]
    for keep, rows in demo_levels(document):
        best, *rest = [row for row in rows if not is_control(row)] or rows
        tied = sum(row["on_task"] == best["on_task"] for row in rest)
        name = str(best["scorer"]) + (f" (and {tied} as good)" if tied else "")
        published = next((_right(row) for row in rows if row["scorer"] == PUBLISHED), NONE)
        found.append((name, named_share(keep), *_cells(best), published))
    return found


def _right(row: Row) -> str:
    return readable_share(float(row["on_task"]))


def _cells(row: Row) -> tuple[str, str, str]:
    return readable_size(row["size"]), _right(row), readable_share(float(row["off_task"]))


def demo_command(document: Document) -> str:
    """How to do what was best here with a model of one's own."""
    best = demo_best(document)
    scorer = best.row["scorer"] if best is not None else "auto"
    keep = f"{float(best.row['keep']):.2g}" if best is not None else "0.8"
    return (
        f"shape-moe prune MODEL --data TASK.jsonl --keep {keep} --scorer {scorer} --rule {document['rule']} -o SMALLER"
    )
