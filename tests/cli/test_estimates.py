"""Figures as a terminal shows them: an interval where one is known, and the value alone where none is."""

from __future__ import annotations

from math import nan

from shape_moe.cli.estimates import number, share, signed
from shape_moe.evaluation.intervals import Estimate


def test_a_figure_has_its_interval() -> None:
    known = Estimate(0.75, 0.5, 0.875)
    assert number(known, 4) == "0.7500 [0.5000, 0.8750]"
    assert share(known) == "75.0% [50.0%, 87.5%]"
    assert signed(known) == "+75.0% [+50.0%, +87.5%]"


def test_what_rounds_to_zero_has_no_minus() -> None:
    almost = Estimate(-0.0, -1e-6, 1e-6)
    assert number(almost, 4) == "0.0000 [0.0000, 0.0000]"
    assert share(almost) == "0.0% [0.0%, 0.0%]"
    assert signed(almost) == "+0.0% [+0.0%, +0.0%]"


def test_a_figure_without_an_interval_stands_alone() -> None:
    for unknown in (Estimate(0.75, nan, nan), Estimate(0.75, 0.5, nan), Estimate(0.75, nan, 0.875)):
        assert not unknown.has_interval
        assert (number(unknown, 4), share(unknown), signed(unknown)) == ("0.7500", "75.0%", "+75.0%")
    assert Estimate(nan, 0.0, 1.0).has_interval
