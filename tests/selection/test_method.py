"""Methods and their one spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.errors import UsageError
from shape_moe.selection.method import ROUTINGS, TARGETS, Method, usual_routing
from shape_moe.selection.rules import rules

METHODS = st.builds(
    Method,
    st.sampled_from(["shape", "easy-ep", "their-own"]),
    st.sampled_from(list(rules())),
    st.sampled_from(ROUTINGS),
    st.sampled_from(TARGETS),
).filter(lambda method: method.target == "ragged" or method.routing == "reroute")


@given(METHODS)
def test_a_spelling_is_read_as_what_it_spells(method) -> None:
    method.check()
    assert Method.parse(str(method)) == method


def test_spellings() -> None:
    assert str(Method()) == "shape/coverage, drop"
    assert str(Method("reap", "uniform", "reroute", "stock")) == "reap/uniform, reroute, stock"
    assert Method("reap", "uniform", "reroute").pair == "reap/uniform"
    assert Method.parse("reap") == Method("reap", "coverage", "drop", "ragged")
    assert Method.parse("reap/global") == Method("reap", "global", "drop", "ragged")
    assert Method.parse("reap/uniform,stock") == Method("reap", "uniform", "reroute", "stock")


def test_what_a_stock_model_can_be() -> None:
    assert Method(routing="reroute", target="stock").equal_counts
    assert not Method(routing="reroute").equal_counts
    assert (usual_routing("stock"), usual_routing("ragged")) == ("reroute", "drop")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a method"),
        ("/coverage", "is not a method"),
        ("shape/", "is not a method"),
        ("shape/coverage, drop, drop", "is not a method"),
        ("shape/coverage, drop, stock, more", "is not a method"),
        ("shape/best", "no rule 'best'"),
        ("shape/coverage, teleport", "drop or reroute, not 'teleport'"),
        ("shape/coverage, drop, stock", "stock needs routing reroute"),
    ],
)
def test_other_texts_are_refused(text, words) -> None:
    with pytest.raises(UsageError, match=words):
        Method.parse(text)


def test_a_target_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="ragged or stock, not 'square'"):
        Method(target="square").check()
