"""Counts that are whole multiples of a fraction of a token are added exactly, however nearly the terms cancel."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from shape_moe.scoring.shape import shape_values
from support import brute_force

MEMBERS = np.array([[0, 1], [1, 3], [0, 2], [2, 3]])
COUNTS = np.array([1_000_000, 1, 999_999, 1])
"""The value of expert 0 is a 2,000,000,000,000th of its tokens: in floating point it would be lost."""


@pytest.mark.parametrize("unit", [1, 2, 7, 999, 1000])
def test_values_are_exact_down_to_a_thousandth_of_a_token(unit) -> None:
    counts = COUNTS if unit == 1 else COUNTS / unit
    exact = brute_force.shape_values(MEMBERS, [Fraction(int(count), unit) for count in COUNTS], 4)
    assert 0 < exact[0] < Fraction(1, 10**6)
    found = shape_values(MEMBERS, counts, 4)
    np.testing.assert_allclose(found, [float(value) for value in exact], rtol=1e-12)


def test_other_counts_are_added_in_floating_point_and_rounding_counts_as_zero() -> None:
    values = shape_values(MEMBERS, COUNTS / np.pi, 4)
    assert values[0] == 0
    exact = brute_force.shape_values(MEMBERS, [Fraction(float(count)) for count in COUNTS / np.pi], 4)
    large = [expert for expert in range(4) if exact[expert] > 1e-6]
    np.testing.assert_allclose(values[large], [float(exact[expert]) for expert in large], rtol=1e-9)


@pytest.mark.parametrize("scale", [1, 0.125, 1 / np.pi])
def test_coalitions_that_served_no_token_do_not_count(scale) -> None:
    """Else they would make every alpha zero."""
    members = np.array([[0, 1], [0, 2], [1, 2], [0, 3], [2, 3]])
    counts = np.array([3, 0, 5, 2, 0]) * scale
    observed = counts > 0
    found = shape_values(members, counts, 4)
    np.testing.assert_array_equal(found, shape_values(members[observed], counts[observed], 4))
    exact = brute_force.shape_values(members, [Fraction(float(count)) for count in counts], 4)
    np.testing.assert_allclose(found, [float(value) for value in exact], rtol=1e-9, atol=1e-12)
