"""What a Python session shows: short descriptions, tables, plain numbers, and errors that name parameters."""

from __future__ import annotations

import inspect
import re
import traceback

import numpy as np
import polars as pl
import pytest
import typer

import shape_moe
from shape_moe.cli.main import VERBS, command
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.evaluation.intervals import Bootstrap, Estimate
from shape_moe.python_names import NAMES, in_python
from shape_moe.tracing.token_weights import SegmentWeights

COMMAND_ONLY = {
    *("--json", "--quiet", "--verbose", "--help", "--help-all", "--csv", "--top", "--list", "--only", "--dry-run"),
    *("--footprint", "--no-footprint", "--no-general", "--preset", "--task"),
}
"""Options of the command that no message sends a user to."""


@pytest.fixture(scope="module")
def trace(embedded) -> shape_moe.Trace:
    return shape_moe.trace(embedded, examples("sorting", 6, seed=1))


def test_a_trace_is_described_in_a_line_and_shown_as_a_table(trace) -> None:
    shown = repr(trace)
    assert re.fullmatch(r"Trace\('.*': 4 layers of 32 experts, 4 per token; 6 examples, \d+ tokens\)", shown)
    frame = trace.to_frame()
    assert frame.shape[0] == 4 * 32
    assert frame.columns[:2] == ["layer", "expert"]
    assert "tokens" in frame.columns
    row = frame.row(by_predicate=(pl.col("layer") == 2) & (pl.col("expert") == 5), named=True)
    assert row["tokens"] == trace.sums("tokens")[2, 5]
    alike = trace.sums("tokens", SegmentWeights())
    np.testing.assert_array_equal(frame["tokens"].to_numpy().reshape(4, 32), alike)
    html = trace._repr_html_()
    assert html.startswith("<p>Trace(")
    assert "<table" in html


def test_scores_and_selections_too(trace) -> None:
    scores, selection = shape_moe.score(trace, "reap"), shape_moe.select(trace, 0.6)
    assert repr(scores) == "Scores('reap': 4 layers of 32 experts)"
    assert scores.to_frame().equals(scores.table())
    assert repr(selection) == "Selection('shape/coverage, drop': keeps 77 of 128 experts (60 %) in 4 layers)"
    frame = selection.to_frame()
    assert frame["kept"].sum() == 77
    assert frame["experts"].to_list() == list(selection.layers.values())
    assert frame["share of value kept"].to_list() == [selection.mass_kept[layer] for layer in selection.layers]
    for shown in (scores, selection):
        assert "<table" in shown._repr_html_()


def test_names_in_a_description_are_not_markup(trace) -> None:
    from dataclasses import replace

    hostile = replace(trace, info=replace(trace.info, model="<script>alert(1)</script>"))
    assert "<script>" not in hostile._repr_html_()


def test_estimates_are_plain_numbers() -> None:
    found = [
        Estimate(np.float64(0.5), np.float64(0.1), np.float64("nan")),
        Bootstrap(20).share(np.arange(20) < 5),
        Bootstrap(20).share_difference(np.arange(20) < 5, np.arange(20) < 7),
        Bootstrap(20).ratio(np.arange(20), np.ones(20)).mapped(np.exp),
    ]
    assert repr(found[0]) == "Estimate(value=0.5, low=0.1, high=nan)"
    for estimate in found:
        assert "np." not in repr(estimate)


def test_errors_say_what_an_option_is_called_in_python(embedded, tmp_path) -> None:
    with pytest.raises(UsageError) as refused:
        shape_moe.prune(embedded, tmp_path / "out", trace=tmp_path / "t", selection=tmp_path / "s", keep=0.5)
    shown = "".join(traceback.format_exception(refused.value))
    assert "In Python --trace is trace=, --selection is selection=." in shown
    assert in_python("leave --samples, --map and --keep-going out") == (
        "In Python --samples is DataOptions(samples=), --map is DataOptions(fields=)."
    )
    assert in_python("vllm serve --enable-eplb") is None
    assert in_python("no option at all") is None


def test_only_options_that_exist_have_a_name_in_python() -> None:
    options = {
        name
        for verb in typer.main.get_command(command()).commands.values()
        for param in verb.params
        for name in (*param.opts, *param.secondary_opts)
        if name.startswith("--")
    }
    assert len(VERBS) >= 15
    assert set(NAMES) <= options | {"--json"}
    assert COMMAND_ONLY & set(NAMES) == set()
    assert len(options & set(NAMES)) >= 60


@pytest.mark.parametrize("option", sorted(NAMES))
def test_the_names_in_python_exist(option) -> None:
    """Either a field of public options, or a parameter of a verb."""
    written = NAMES[option].split("(", 1)
    if len(written) == 1:
        parameter = written[0].split("=")[0]
        verbs = [getattr(shape_moe, name) for name in shape_moe.__all__ if name.islower() and name.isidentifier()]
        known = {name for verb in verbs if callable(verb) for name in inspect.signature(verb).parameters}
        assert parameter in known
        return
    owner, rest = written
    parameter = rest.split(")")[0].split("=")[0]
    place = _owner(owner)
    if parameter and not parameter.startswith("'"):
        assert parameter in inspect.signature(place).parameters


def _owner(name: str):
    from shape_moe.jobs.evaluate_endpoints import EndpointOptions
    from shape_moe.jobs.judgement import JudgementOptions

    others = {"EndpointOptions": EndpointOptions, "JudgementOptions": JudgementOptions}
    first, *rest = name.split(".")
    found = others.get(first) or getattr(shape_moe, first)
    for part in rest:
        found = getattr(found, part)
    return found
