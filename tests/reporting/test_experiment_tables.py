"""The tables of an experiment: what is bold, what is missing, and how seeds are put together."""

from __future__ import annotations

import pytest

from shape_moe.reporting.experiment_tables import experiment_markdown


def figure(value, reach=0.1):
    return {"value": value, "low": value - reach, "high": value + reach}


def cell(method, keep, exact=None, kl=None, seed=None, reason=None, score=None):
    scorer, rule = method.split("/")
    sets = {}
    if exact is not None:
        quality = {"exact_match": figure(exact), "kl": figure(kl, 0.0)}
        sets["sums"] = {"quality": quality, "change": {}, "generation": None}
        sets["quiz"] = {"tasks": {"quiz": {"acc": figure(score if score is not None else exact)}}, "change": {}}
    common = {"model": "m", "calibration": "sums", "routing": "drop", "scorer": scorer, "rule": rule, "seed": seed}
    size = None if reason else 500
    return {**common, "keep_asked": keep, "keep": keep, "bytes": size, "reason": reason, "sets": sets}


@pytest.fixture
def document():
    dense = {
        "sums": {
            "quality": {"exact_match": figure(0.9), "kl": figure(0.0, 0.0)},
            "generation": None,
            "examples": 40,
            "generated": 0,
        },
        "quiz": {"tasks": {"quiz": {"acc": {"value": 0.75, "low": None, "high": None}}}, "items": {"quiz": 30}},
    }
    common = {"calibration": ["sums"]}
    return {
        "config": {"seed": 3, "keep": [0.8, 0.4], "routings": ["drop"]},
        "versions": {"shape-moe": "9"},
        "models": [{"name": "m"}],
        "calibration": [{"name": "sums", "examples": 25}],
        "evaluation": [
            {**common, "name": "sums", "kind": "examples", "metrics": ["exact_match", "kl"], "sentence": "fresh ones"},
            {**common, "name": "quiz", "kind": "task", "task": "quiz", "metrics": [], "fewshot": 5},
        ],
        "dense": [{"model": "m", "bytes": 1000, "sets": dense}],
        "cells": [
            cell("shape/coverage", 0.8, 0.8, 0.2),
            cell("shape/coverage", 0.4, 0.5, 0.4),
            cell("reap/uniform", 0.8, 0.7, 0.1),
            cell("reap/uniform", 0.4, reason="m, reap/uniform: too few"),
            cell("random/uniform", 0.8, 0.2, 0.9, seed=0),
            cell("random/uniform", 0.8, 0.4, 0.7, seed=1),
            cell("random/uniform", 0.4, 0.5, 0.8, seed=0),
            cell("random/uniform", 0.4, 0.7, 0.8, seed=1),
        ],
    }


def rows(text, title):
    """Rows of the table that follows a title, by method."""
    table = text[text.index(title) :].split("\n\n")[1]
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines if line[0] != "---"}


def test_rows_are_methods_and_columns_are_keep_rates(document):
    found = rows(experiment_markdown(document), "**Exact match, teacher-forced (larger is better); calibrated on sums")
    assert found == {
        "method": ["keep 80 %", "keep 40 %"],
        "dense": ["90 % [80, 100]"] * 2,
        "shape/coverage": ["**80 % [70, 90]**", "50 % [40, 60]"],
        "reap/uniform": ["70 % [60, 80]", "not possible"],
        "random/uniform, mean of 2 seeds": ["30 % (20 to 40)", "**60 % (50 to 70)**"],
    }


def test_the_smallest_divergence_is_the_best(document):
    found = rows(
        experiment_markdown(document), "**KL divergence to the dense model, nats per token (smaller is better)"
    )
    assert found["reap/uniform"][0] == "**0.1**"
    assert found["shape/coverage"] == ["0.2", "**0.4**"]


def test_tasks_of_lm_eval_have_tables_of_their_own(document):
    text = experiment_markdown(document)
    found = rows(text, "**Quiz: acc (larger is better)")
    assert found["dense"] == ["0.7500", "0.7500"]  # no interval is known
    assert found["shape/coverage"][0] == "**0.8000 [0.7000, 0.9000]**"
    assert "30 items of quiz, 5 examples in the prompt" in text
    assert "Whether calibration has seen them is not checked." in text


def test_equal_values_are_all_bold(document):
    document["cells"][2] = cell("reap/uniform", 0.8, 0.8, 0.2)
    found = rows(experiment_markdown(document), "**Exact match")
    assert found["shape/coverage"][0] == found["reap/uniform"][0] == "**80 % [70, 90]**"


def test_nothing_is_bold_where_there_is_nothing_to_compare(document):
    document["cells"] = document["cells"][:2]
    assert rows(experiment_markdown(document), "**Exact match")["shape/coverage"][0] == "80 % [70, 90]"


def test_the_text_says_what_the_figures_rest_on(document):
    text = experiment_markdown(document)
    assert "n = 40: fresh ones." in text
    assert "Weights: 1000 B dense, 500 B at keep 80 %, 500 B at keep 40 %." in text
    assert "Calibration: sums: 25 examples. Seed 3; shape-moe 9." in text
    assert text.endswith("Not possible:\n\n- m, reap/uniform: too few\n")


def test_figures_that_are_not_there_are_said_to_be_missing(document):
    document["evaluation"][0]["metrics"] = ["generated_exact_match"]
    assert "None of the figures asked for (generated_exact_match) is there." in experiment_markdown(document)
