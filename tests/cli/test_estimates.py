"""Figures as a terminal shows them: an interval where one is known, and the value alone where none is."""

from __future__ import annotations

from math import nan

from shape_moe.cli.estimates import kl, number, points, share
from shape_moe.evaluation.intervals import Estimate


def test_a_figure_has_its_interval() -> None:
    known = Estimate(0.75, 0.5, 0.875)
    assert number(known, 4) == "0.7500 [0.5000, 0.8750]"
    assert share(known) == "75 % [50, 88]"
    assert points(known) == "+75 [+50, +88]"
    assert kl(Estimate(0.0123, 0.0004, 0.04)) == "0.012 [< 0.001, 0.04]"


def test_what_rounds_to_zero_has_no_minus() -> None:
    almost = Estimate(-0.0, -1e-6, 1e-6)
    assert number(almost, 4) == "0.0000"
    assert share(almost) == "0 % [> -0.1, < 0.1]"
    assert points(almost) == "0 [> -0.1, < +0.1]"


def test_an_interval_that_says_no_more_is_left_out() -> None:
    assert share(Estimate(1.0, 1.0, 1.0)) == "100 %"
    assert kl(Estimate(2e-5, 1e-5, 3e-5)) == "< 0.001"


def test_a_figure_without_an_interval_stands_alone() -> None:
    for unknown in (Estimate(0.75, nan, nan), Estimate(0.75, 0.5, nan), Estimate(0.75, nan, 0.875)):
        assert not unknown.has_interval
        assert (number(unknown, 4), share(unknown), points(unknown)) == ("0.7500", "75 %", "+75")
    assert Estimate(nan, 0.0, 1.0).has_interval
