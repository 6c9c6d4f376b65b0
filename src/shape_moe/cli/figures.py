"""Figures with their intervals, as a terminal shows them."""

from __future__ import annotations

from shape_moe.evaluation.intervals import Estimate


def number(estimate: Estimate, digits: int) -> str:
    """A figure with its interval."""
    return _shown(estimate, f".{digits}f")


def share(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    return _shown(estimate, ".1%")


def signed(estimate: Estimate) -> str:
    """A difference with its interval, in percent."""
    return _shown(estimate, "+.1%")


def _shown(estimate: Estimate, form: str) -> str:
    if not estimate.has_interval:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
