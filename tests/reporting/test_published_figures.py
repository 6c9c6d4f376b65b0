"""Published figures beside an experiment's own: where they lie, and how their stack differs."""

from __future__ import annotations

import pytest

from shape_moe.reporting.experiment_tables import experiment_markdown
from shape_moe.reporting.published_figures import published_rows, where_it_lies


def figure(value, reach=0.05):
    return {"value": value, "low": value - reach, "high": value + reach}


def cell(method, keep, value, *, seed=None, routing="drop"):
    scorer, rule = method.split("/")
    sets = {"quiz": {"tasks": {"quiz": {"acc": figure(value), "other": figure(0.5)}}, "change": {}}}
    place = {"model": "m", "calibration": "c", "routing": routing, "scorer": scorer, "rule": rule, "seed": seed}
    return {**place, "keep_asked": keep, "keep": keep, "bytes": 500, "reason": None, "sets": sets}


@pytest.fixture
def document():
    published = {
        "metric": "acc",
        "routing": "drop",
        "source": "a paper",
        "differences": ["another stack", "other examples"],
        "percent": {
            "m": {
                "dense": 91.0,
                "shape/coverage": {"0.8": 88.0, "0.4": 40.0},
                "random/uniform": {"0.8": 30.0},
                "reap/uniform": {"0.4": 10.0},
            },
            "another": {"dense": 1.0},
        },
    }
    quiz = {"name": "quiz", "kind": "task", "task": "quiz", "metrics": [], "fewshot": 5, "calibration": ["c"]}
    dense = {"tasks": {"quiz": {"acc": figure(0.9), "other": figure(0.5)}}, "items": {"quiz": 30}}
    return {
        "config": {"seed": 3, "keep": [0.8, 0.4], "routings": ["drop", "reroute"]},
        "versions": {"shape-moe": "9"},
        "models": [{"name": "m"}],
        "calibration": [{"name": "c", "examples": 25}],
        "evaluation": [{**quiz, "published": published}],
        "dense": [{"model": "m", "bytes": 1000, "sets": {"quiz": dense}}],
        "cells": [
            cell("shape/coverage", 0.8, 0.85),
            cell("shape/coverage", 0.4, 0.6),
            cell("shape/coverage", 0.8, 0.85, routing="reroute"),
            cell("random/uniform", 0.8, 0.2, seed=0),
            cell("random/uniform", 0.8, 0.4, seed=1),
            cell("random/uniform", 0.4, 0.3, seed=0),
        ],
    }


def test_cells_end_with_where_the_published_figure_lies(document) -> None:
    tables = experiment_markdown(document)
    drop, reroute = (tables.partition(f"routing {name}")[2].partition("**Quiz")[0] for name in ("drop", "reroute"))
    assert "| dense | 0.9000 [0.8500, 0.9500]; published 0.9100: inside |" in drop
    shape = next(line for line in drop.splitlines() if "shape/coverage" in line)
    assert "0.8500 [0.8000, 0.9000]; published 0.8800: inside" in shape
    assert "0.6000 [0.5500, 0.6500]; published 0.4000: outside" in shape
    random = next(line for line in drop.splitlines() if "random/uniform" in line)
    assert "0.3000 (0.2000 to 0.4000); published 0.3000: inside" in random
    assert "published" not in random.rpartition("|")[0].rpartition("|")[2]  # nothing was published at 0.4
    assert "published" not in reroute.partition("quiz: other")[0]
    assert "Published figures: a paper. Known differences of their stack: another stack; other examples." in tables


def test_rows_name_every_figure_that_was_published(document) -> None:
    rows = published_rows(document)
    assert [(row["method"], row["keep"], row.get("seed"), row["lies"]) for row in rows] == [
        ("dense", None, None, "inside"),
        ("shape/coverage", 0.8, None, "inside"),
        ("shape/coverage", 0.4, None, "outside"),
        ("random/uniform", 0.8, 0, "outside"),
        ("random/uniform", 0.8, 1, "outside"),
    ]
    assert {(row["model"], row["evaluation"], row["metric"]) for row in rows} == {("m", "quiz", "acc")}
    assert [row["published"] for row in rows] == [0.91, 0.88, 0.4, 0.3, 0.3]
    del document["evaluation"][0]["published"]
    assert published_rows(document) == []
    assert "ublished" not in experiment_markdown(document)


def test_a_figure_without_an_interval() -> None:
    alone = {"value": 0.5, "low": None, "high": None}
    assert (where_it_lies(0.5, [alone]), where_it_lies(0.4, [alone])) == ("equal", "different")
    assert [where_it_lies(end, [figure(0.5, 0.25)]) for end in (0.25, 0.75, 0.7501)] == ["inside", "inside", "outside"]
