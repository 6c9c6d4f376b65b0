"""The metrics that results are shown in: where they stand, in which unit, and what the dense model has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.measures import Measured
from shape_moe.reporting.figures.figure import number
from shape_moe.units import NONE, readable_kl, readable_share

_PERCENT = "\N{NO-BREAK SPACE}%"
_TIMES = "\N{MULTIPLICATION SIGN}"
_WIDE_RANGE = 30.0
"""Positive values that differ by more than this factor are drawn on a logarithmic axis."""
_FEW_DECADES = 5


@dataclass(frozen=True)
class Metric:
    """One way to look at quality.

    Attributes:
        title: short name.
        axis: name with unit.
        group: ``quality``, ``change`` or ``generation``.
        key: name within the group.
        factor: from the stored number to the unit shown.
        unit: what a text puts before (a multiplication sign) or after the number.
        better: ``lower`` or ``higher``.
        dense: the dense model's value by definition, None where it is measured.
    """

    title: str
    axis: str
    group: Literal["quality", "change", "generation"]
    key: str
    factor: float
    unit: str
    better: Literal["lower", "higher"]
    dense: float | None = None

    @property
    def line(self) -> str:
        """What is shown, and which direction is the better one."""
        return f"{self.axis[0].upper()}{self.axis[1:]}; {self.better} is better."

    def of(self, measured: Measured) -> Estimate | None:
        """The estimate in the unit shown; None where it was not measured."""
        answers = measured.health.figures if measured.health else {}
        found = {"quality": measured.quality, "change": measured.change, "generation": answers}[self.group].get(
            self.key
        )
        if found is None or not math.isfinite(found.value):
            return None
        return Estimate(found.value * self.factor, found.low * self.factor, found.high * self.factor)

    def of_dense(self, measured: Measured | None) -> float | None:
        """The dense model's value in the unit shown."""
        if self.dense is not None:
            return self.dense
        found = self.of(measured) if measured is not None else None
        return found.value if found is not None else None

    def text(self, measured: Measured) -> str:
        """The estimate with its interval; a dash where it was not measured."""
        found = self.of(measured)
        if found is None:
            return NONE
        text = self.shown(found.value)
        if not found.has_interval:
            return text
        low, high = (self.shown(end).removeprefix(_TIMES).removesuffix(_PERCENT) for end in (found.low, found.high))
        shown = text.removeprefix(_TIMES).removesuffix(_PERCENT)
        return text if shown == low == high else f"{text} [{low}, {high}]"

    def shown(self, value: float) -> str:
        """A value with its unit, in the digits that mean something."""
        if self.unit == _PERCENT:
            return readable_share(value / 100).replace(" %", _PERCENT)
        return f"{_TIMES}{number(value)}" if self.unit == _TIMES else readable_kl(value)


METRICS = (
    Metric("KL to the dense model", "KL to the dense model, nats per token", "quality", "kl", 1, "", "lower", 0.0),
    Metric("Exact match", "exact match, % of examples", "quality", "exact_match", 100, _PERCENT, "higher"),
    Metric(
        *("Perplexity", "perplexity, as a multiple of the dense model's", "change", "perplexity"),
        *(1, _TIMES, "lower", 1.0),
    ),
    Metric(
        *("Same next token", "same most likely next token as the dense model, %", "quality", "top1"),
        *(100, _PERCENT, "higher", 100.0),
    ),
    Metric(
        *("Generated answers", "exact match of generated answers, %", "generation", "exact_match"),
        *(100, _PERCENT, "higher"),
    ),
    Metric("Loops", "generated answers that loop, %", "generation", "loop_rate", 100, _PERCENT, "lower"),
)


def known_metrics(entries: Iterable[Measured]) -> list[Metric]:
    """The metrics that at least one of several results has."""
    results = list(entries)
    return [metric for metric in METRICS if any(metric.of(result) is not None for result in results)]


def is_wide(estimates: Iterable[Estimate | None]) -> bool:
    """Whether values are better shown on a logarithmic axis."""
    values = [estimate.value for estimate in estimates if estimate is not None]
    return bool(values) and min(values) > 0 and max(values) > _WIDE_RANGE * min(values)


def value_axis(estimates: Iterable[Estimate | None], *, log: bool) -> dict[str, Any]:
    """An axis of values that are named above the figure; a logarithmic one has ticks at 1 (2 and 5) of a decade."""
    axis: dict[str, Any] = {"type": "log" if log else "linear"}
    if log:
        values = [estimate.value for estimate in estimates if estimate is not None]
        decades = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1)
        steps = (1, 2, 5) if len(decades) <= _FEW_DECADES else (1,)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        axis |= {"tickmode": "array", "tickvals": ticks, "ticktext": [_plain(tick) for tick in ticks]}
    else:
        axis |= {"tickmode": "auto"}
    return axis


def _plain(tick: float) -> str:
    """A number without an exponent."""
    return f"{tick:.12f}".rstrip("0").rstrip(".")


def error_bars(estimates: Sequence[Estimate | None], *, log: bool) -> dict[str, Any]:
    """Plotly's error bars from the ends of intervals; on a logarithmic axis none goes below a tenth of its value."""
    above: list[float | None] = []
    below: list[float | None] = []
    for estimate in estimates:
        if estimate is None or not estimate.has_interval:
            above.append(None)
            below.append(None)
            continue
        low = max(estimate.low, estimate.value / 10) if log else estimate.low
        above.append(max(estimate.high - estimate.value, 0.0))
        below.append(max(estimate.value - low, 0.0))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.5, "width": 4}
