"""Numbers as people read them."""

from __future__ import annotations

import pytest

from shape_moe.units import counted, readable_size, size_unit


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
