"""``--gate-scale`` on the command line: one meaning for every verb that takes it, and shown by ``inspect``."""

from __future__ import annotations

import pytest

from shape_moe.cli.choice_flags import ScoreFlags, SelectFlags
from shape_moe.cli.inspect import _document
from shape_moe.cli.sweep import _methods
from shape_moe.errors import UsageError
from shape_moe.jobs.inspect import inspect_model

TRAINED = "shape/coverage, reroute, trained"


def chosen(**flags: str) -> str:
    return str(SelectFlags(**flags).options(0.5, ScoreFlags(), 0).method)


def test_one_flag_and_one_spelling() -> None:
    assert chosen(gate_scale="trained") == chosen(routing="reroute", gate_scale="trained") == TRAINED
    flags, score = SelectFlags(method=TRAINED).spelled_out(ScoreFlags())
    assert str(flags.options(0.5, score, 0).method) == TRAINED
    assert chosen(routing="reroute", gate_scale="survivors") == "shape/coverage, reroute"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"gate_scale": "grown"}, "survivors or trained, not 'grown'"),
        ({"gate_scale": "trained", "routing": "drop"}, "goes with routing reroute"),
        ({"gate_scale": "trained", "target": "stock"}, "goes with target ragged"),
    ],
)
def test_what_means_nothing_is_refused(flags, words) -> None:
    with pytest.raises(UsageError, match=words):
        chosen(**flags)


def test_a_method_says_it_already() -> None:
    with pytest.raises(UsageError, match="leave --gate-scale out"):
        SelectFlags(method=TRAINED, gate_scale="trained").spelled_out(ScoreFlags())
    with pytest.raises(UsageError, match="leave --gate-scale out"):
        _methods([TRAINED], None, None, None, ["trained"], None)


@pytest.mark.parametrize(
    ("routings", "scales", "found"),
    [
        (None, None, ["drop"]),
        (None, ["trained"], ["reroute, trained"]),
        (["drop", "reroute"], ["trained"], ["drop", "reroute, trained"]),
        (["reroute", "drop"], ["survivors", "trained"], ["reroute", "reroute, trained", "drop"]),
    ],
)
def test_a_sweep_takes_both_scales(routings, scales, found) -> None:
    assert [method.routed for method in _methods(None, None, None, routings, scales, None)] == found


def test_inspect_says_whether_it_matters(checkpoint) -> None:
    found = {name: _document(inspect_model(checkpoint(name)))["gate_scale"] for name in ("olmoe", "qwen3_moe")}
    assert found == {"olmoe": True, "qwen3_moe": False}
