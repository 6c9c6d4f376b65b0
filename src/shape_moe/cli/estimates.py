"""Estimates with their intervals, as a terminal shows them."""

from __future__ import annotations

from shape_moe.evaluation.intervals import Estimate


def number(estimate: Estimate, digits: int) -> str:
    """An estimate with its interval."""
    return _shown(estimate, f"z.{digits}f")


def share(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    return _shown(estimate, "z.1%")


def signed(estimate: Estimate) -> str:
    """A difference with its interval, in percent."""
    return _shown(estimate, "+z.1%")


def _shown(estimate: Estimate, form: str) -> str:  # z: no minus before what is rounded to zero
    if not estimate.has_interval:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
