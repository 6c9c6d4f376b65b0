"""The lines that terminal, card and report open with: the method in full, size and experts, and what to type next."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.evaluation.verdict import Verdict, Word
from shape_moe.reporting.opening import full_method, next_commands, next_keep_rate, short_name, size_line, smaller
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection
from support.data import routing_trace


def selected(method: Method | None = None, **options) -> Selection:
    return select_from_trace(routing_trace(), SelectOptions(keep=0.5, method=method or Method(), **options))


def test_only_the_published_method_is_called_so() -> None:
    published = "shape/coverage, drop, ragged, 25 calibration examples (the published SHAPE method)"
    assert full_method(selected(), 25) == published
    others = [
        full_method(selected(), 128),
        full_method(selected(Method("frequency")), 25),
        full_method(selected(Method("shape", "global")), 25),
        full_method(selected(Method("shape", "uniform", "reroute", "stock")), 25),
        full_method(selected(Method(routing="reroute")), 25),
        full_method(selected(multiple_of=4), 25),
        full_method(selected(skip_layers=(1,)), 25),
        full_method(selected(protect={2: (0, 5)}), 25),
        full_method(replace(selected(), options={"prompt": 0.25, "response": 1.0}), 25),
    ]
    for told in others:
        assert told.endswith("(not the published SHAPE method)")
    assert others[3].startswith("shape/uniform, reroute, stock, 25 calibration examples")
    assert full_method(selected(), None).endswith("if it was calibrated with 25 examples)")


def test_the_size_names_its_model_layers_and_experts() -> None:
    told = size_line("m", selected(), (4 * 2**30, 3 * 2**30))
    assert told == "m (4 layers of 16 experts): 25 % smaller, from 4.00 GiB to 3.00 GiB; 32 of 64 experts kept."
    assert size_line("m", selected(), None) == "m (4 layers of 16 experts): 32 of 64 experts kept."
    assert size_line("m", None, (10, 10)) == "m: not smaller, from 10 B to 10 B."
    assert size_line("m", None, None) == "m."


@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_smaller_is_said_of_what_is_smaller(before: int, after: int) -> None:
    told = smaller(before, after)
    assert told.endswith(" % smaller") == (after < before)
    assert "-" not in told


@given(st.floats(0.01, 1))
def test_the_next_keep_rate_keeps_more(keep: float) -> None:
    found = next_keep_rate(keep)
    assert keep <= found <= 1
    assert found == pytest.approx(round(found * 20) / 20)
    assert keep == 1 or found - keep >= (1 - keep) / 5 - 1e-6


def verdict(word: Word) -> Verdict:
    return Verdict(word, "", "")


def test_what_to_type_next_depends_on_the_verdict() -> None:
    method = Method("reap", "global", "reroute")
    words = {
        word: next_commands("./my model", "out dir", verdict(word), keep=0.5, method=method, data="--data 'a b.jsonl'")
        for word in Word
    }
    judge = ["shape-moe", "evaluate", "./my model", "out dir", "--data", "HELD_OUT.jsonl", "-o", "evaluation.json"]
    assert words[Word.SAFE] == []
    for word in (Word.NO_LOSS, Word.NOT_MEASURED):
        assert [shlex.split(command) for command in words[word]] == [judge]
    assert words[Word.LOSS] == words[Word.DAMAGED]
    (again,) = words[Word.DAMAGED]
    assert shlex.split(again) == [
        *("shape-moe", "prune", "./my model", "--data", "a b.jsonl", "--keep", "0.6"),
        *("--method", "reap/global, reroute", "-o", "out dir-larger"),
    ]
    assert next_commands("m", "d", None, keep=0.5, method=method)[0].startswith("shape-moe evaluate m d ")


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/name", "org/name"), ("/a/b/Qwen3/", "Qwen3"), ("./Qwen3", "Qwen3"), ("/a/demo/model", "demo/model")],
)
def test_models_have_short_names(model: str, name: str) -> None:
    assert short_name(model) == name
