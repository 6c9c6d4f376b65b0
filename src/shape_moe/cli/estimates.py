"""Estimates with their intervals, as a terminal shows them."""

from __future__ import annotations

from collections.abc import Callable

from shape_moe.evaluation.intervals import Estimate
from shape_moe.units import readable_kl, readable_points, readable_share


def number(estimate: Estimate, digits: int) -> str:
    """An estimate with its interval."""
    return _shown(estimate, lambda value: f"{value:z.{digits}f}")  # z: no minus before what is rounded to zero


def kl(estimate: Estimate) -> str:
    """A divergence in nats, with its interval."""
    return _shown(estimate, readable_kl)


def share(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    return _shown(estimate, readable_share, " %")


def points(estimate: Estimate) -> str:
    """A difference of shares with its interval, in percentage points."""
    return _shown(estimate, readable_points)


def _shown(estimate: Estimate, readable: Callable[[float], str], unit: str = "") -> str:
    """The value, and the ends of its interval where they are known and say more than the value."""
    value = readable(estimate.value)
    if not estimate.has_interval:
        return value
    low, high = (readable(end).removesuffix(unit) for end in (estimate.low, estimate.high))
    return value if value.removesuffix(unit) == low == high else f"{value} [{low}, {high}]"
