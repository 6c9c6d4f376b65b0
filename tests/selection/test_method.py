"""Methods and their one spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.architectures.moe_config import GATE_SCALES, read_moe_config
from shape_moe.errors import UsageError
from shape_moe.selection.method import (
    ROUTINGS,
    TARGETS,
    Method,
    check_for_model,
    gate_scales,
    read_routed,
    usual_routing,
)
from shape_moe.selection.rules import rules
from support.tiny_models import make_config

METHODS = st.builds(
    Method,
    st.sampled_from(["shape", "easy-ep", "their-own"]),
    st.sampled_from(list(rules())),
    st.sampled_from(ROUTINGS),
    st.sampled_from(TARGETS),
    st.sampled_from(GATE_SCALES),
).filter(
    lambda method: (
        (method.target == "ragged" or method.routing == "reroute")
        and (method.gate_scale == "survivors" or (method.target, method.routing) == ("ragged", "reroute"))
    )
)


@given(METHODS)
def test_a_spelling_is_read_as_what_it_spells(method) -> None:
    method.check()
    assert Method.parse(str(method)) == method
    assert Method.parse(f"{method.pair}, {method.routing}, {method.target}, {method.gate_scale}") == method
    assert read_routed(method.routed) == (method.routing, method.gate_scale)


def test_spellings() -> None:
    assert str(Method()) == "shape/coverage, drop"
    assert str(Method("reap", "uniform", "reroute", "stock")) == "reap/uniform, reroute, stock"
    assert Method("reap", "uniform", "reroute").pair == "reap/uniform"
    assert Method.parse("reap") == Method("reap", "coverage", "drop", "ragged")
    assert Method.parse("reap/global") == Method("reap", "global", "drop", "ragged")
    assert Method.parse("reap/uniform,stock") == Method("reap", "uniform", "reroute", "stock")
    trained = Method("shape", "coverage", "reroute", "ragged", "trained")
    assert str(trained) == "shape/coverage, reroute, trained"
    assert Method.parse("shape/coverage, trained") == Method.parse("shape, reroute, ragged, trained") == trained


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
        ("shape/coverage, trained, reroute", "is not a method"),
        ("shape/coverage, drop, trained", "trained goes with routing reroute"),
        ("shape/coverage, reroute, stock, trained", "trained goes with target ragged"),
    ],
)
def test_other_texts_are_refused(text, words) -> None:
    with pytest.raises(UsageError, match=words):
        Method.parse(text)


def test_a_target_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="ragged or stock, not 'square'"):
        Method(target="square").check()


def test_a_gate_scale_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="survivors or trained, not 'grown'"):
        Method(gate_scale="grown").check()
    for text in ("reroute, grown", "reroute, ", "drop, trained"):
        with pytest.raises(UsageError):
            read_routed(text)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen3_moe", r"qwen3_moe\): its routers renormalise the weights .*; leave --gate-scale out"),
        ("mixtral", "renormalise"),
        ("gpt_oss", "renormalise"),
        ("granitemoe", "renormalise"),
        ("deepseek_v3", r"score every expert by itself \(a sigmoid\)"),
        ("glm4_moe", "sigmoid"),
        ("qwen2_moe", None),
        ("olmoe", None),
        ("deepseek_v2", None),
    ],
)
def test_the_trained_scale_is_for_softmaxes_that_are_not_renormalised(family, why) -> None:
    moe, method = read_moe_config(make_config(family).to_dict()), Method(routing="reroute", gate_scale="trained")
    check_for_model(Method(routing="reroute"), moe)
    if why is None:
        check_for_model(method, moe)
        assert gate_scales(moe, "reroute", "ragged") == ("trained", "survivors")
        assert gate_scales(moe, "drop", "ragged") == gate_scales(moe, "reroute", "stock") == ("survivors",)
    else:
        with pytest.raises(UsageError, match=why):
            check_for_model(method, moe)
        assert gate_scales(moe, "reroute", "ragged") == ("survivors",)


def test_a_configuration_may_turn_renormalising_off() -> None:
    moe = read_moe_config(make_config("qwen3_moe", norm_topk_prob=False).to_dict())
    check_for_model(Method(routing="reroute", gate_scale="trained"), moe)
