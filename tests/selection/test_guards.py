"""Warnings come at their limits and not before, and name what they are about."""

from __future__ import annotations

import numpy as np
import pytest

from shape_moe.selection.guards import (
    super_experts,
    warn_inflation,
    warn_lost_super_experts,
    warn_unseen,
    warn_unstable,
)
from shape_moe.selection.method import TARGETS, Method


def test_a_super_expert_has_more_than_ten_times_the_median_norm_of_the_experts_seen() -> None:
    norms = np.array([[1.0, 2.0, 3.0, 25.0, 0.0, 0.0], [1.0, 2.0, 3.0, 29.0, 30.0, 0.0]])
    # medians of the experts that were seen: 2.5 (so that 25 is none) and 3 (so that 30 is none)
    assert not super_experts(norms).any()
    norms[0, 3], norms[1, 4] = 25.1, 30.1
    assert np.argwhere(super_experts(norms)).tolist() == [[0, 3], [1, 4]]


def test_lost_super_experts_have_their_layers_names_and_five_are_named() -> None:
    norms = np.ones((2, 30))
    norms[0, [1, 2]] = 50
    norms[1, [0, 4, 5, 6, 7, 8]] = 50
    kept = np.ones((2, 30), dtype=bool)
    assert warn_lost_super_experts((3, 9), norms, kept) == []
    kept[:, [0, 1, 2]] = False
    (warning,) = warn_lost_super_experts((3, 9), norms, kept)
    assert "drops 3 experts" in warning
    assert "(layer 3 expert 1, layer 3 expert 2, layer 9 expert 0)" in warning
    assert "--protect 3:1 --protect 3:2 --protect 9:0," in warning
    (warning,) = warn_lost_super_experts((3, 9), norms, np.zeros((2, 30), dtype=bool))
    assert "drops 8 experts" in warning
    assert "layer 9 expert 5 and 3 more)" in warning


@pytest.mark.parametrize(("unseen", "warned"), [(0, False), (2, False), (3, True), (40, True)])
def test_more_than_one_expert_in_twenty_without_a_token_is_said(unseen, warned) -> None:
    tokens = np.full((2, 20), 0.5)
    tokens.ravel()[:unseen] = 0
    warnings = warn_unseen(tokens)
    assert len(warnings) == warned
    assert not warned or warnings[0].startswith(f"{unseen} of 40 experts")


@pytest.mark.parametrize(("agreement", "warned"), [(1.0, False), (0.9, False), (0.8999, True), (0.0, True)])
def test_halves_that_agree_on_less_than_nine_in_ten_are_said(agreement, warned) -> None:
    assert len(warn_unstable({"agreement": agreement, "undecided": 1.0})) == warned


@pytest.mark.parametrize(
    ("routing", "renormalises", "warned"),
    [("reroute", False, True), ("reroute", True, False), ("reroute", None, False), ("drop", False, False)],
)
def test_only_rerouting_without_renormalisation_inflates(routing, renormalises, warned) -> None:
    assert len(warn_inflation(Method(routing=routing), renormalises)) == warned


def test_what_helps_against_inflation_is_named() -> None:
    (ragged,), (stock,) = (warn_inflation(Method(routing="reroute", target=target), False) for target in TARGETS)
    assert ragged.endswith("compare with --gate-scale trained, which keeps their size.")
    assert stock.endswith("compare with --routing drop.")
    assert warn_inflation(Method(routing="reroute", gate_scale="trained"), False) == []
