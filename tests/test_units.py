"""Numbers as people read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.units import (
    counted,
    kl_at_most,
    readable_kl,
    readable_points,
    readable_share,
    readable_size,
    share_at_most,
    size_unit,
)


@pytest.mark.parametrize("size", [2**20, 2**30 - 1, 2**30, 5 * 2**40])
def test_sizes_side_by_side_have_the_unit_of_the_largest(size: int) -> None:
    unit, divisor = size_unit(size)
    assert f"{size / divisor:.2f} {unit}" == readable_size(size)


def test_counts_have_their_noun() -> None:
    assert [counted(count, "token") for count in (0, 1, 2, 12345.0)] == [
        "0 tokens",
        "1 token",
        "2 tokens",
        "12,345 tokens",
    ]


@given(st.floats(-1, 1))
def test_shares_have_the_digits_that_mean_something(share: float) -> None:
    shown = readable_share(share)
    assert re.fullmatch(r"([<>] )?-?\d{1,3}(\.\d)? %", shown)
    assert not re.search(r"-0(\.0)? ", shown)  # no minus before a zero
    assert (shown == "0 %") == (share == 0)
    assert shown != "100 %" or share == 1  # 100 % means all
    value = float(re.search(r"-?[\d.]+", shown)[0]) / 100
    below, above = shown.startswith("<"), shown.startswith(">")
    assert abs(value - share) <= 0.005 + 1e-12
    assert not below or share < value
    assert not above or share > value


@given(st.floats(0, 1), st.floats(0, 1))
def test_larger_shares_never_look_smaller(one: float, other: float) -> None:
    def size(share: float) -> float:
        shown = readable_share(share)
        return float(re.search(r"[\d.]+", shown)[0]) + {"<": -0.01, ">": 0.01}.get(shown[0], 0)

    assert (size(one) <= size(other)) or one > other


@given(st.floats(-1, 1))
def test_differences_have_a_sign(difference: float) -> None:
    shown = readable_points(difference)
    assert ("+" in shown) == (difference > 0)
    assert ("-" in shown) == (difference < 0)
    assert shown.replace("+", "") == readable_share(difference).removesuffix(" %")


@given(st.floats(0, 1))
def test_a_bound_still_holds_as_it_is_shown(share: float) -> None:
    shown = share_at_most(share)
    value = float(re.search(r"[\d.]+", shown)[0]) / 100
    assert value >= share - 1e-9 or shown.startswith(">")


@given(st.floats(0, 1e6))
def test_a_divergence_has_two_digits_and_no_zero_that_is_none(nats: float) -> None:
    shown = readable_kl(nats)
    assert "e" not in shown
    if shown == "< 0.001":
        assert nats < 0.001
    else:
        assert float(shown) == pytest.approx(nats, rel=0.06)
        assert len(shown.replace(".", "").lstrip("0").rstrip("0")) <= 2 or nats >= 10


@given(st.floats(0, 1e4))
def test_a_bound_on_a_divergence_still_holds_as_it_is_shown(nats: float) -> None:
    shown = float(kl_at_most(nats))
    assert shown >= nats * (1 - 1e-9)
    assert shown <= max(0.001, 1.11 * nats)
