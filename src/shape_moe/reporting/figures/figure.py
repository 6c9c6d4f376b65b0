"""What a figure of the report is made of: Plotly traces whose colours are names, a text alternative and a table."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shape_moe.evaluation.intervals import Estimate

_CODES = {"float32": "f4", "uint8": "u1", "uint16": "u2", "int32": "i4"}


@dataclass(frozen=True)
class Table:
    """Numbers for those who would rather read them, and for those who cannot see the plot.

    Attributes:
        caption: what the table holds.
        headings: one per column; the first column names the row.
        rows: cells as text.
        texts: how many of the first columns hold text rather than numbers.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1


@dataclass(frozen=True)
class Swatch:
    """An entry of a figure's legend, which stands in the page (a plot's own legend does not fold on a phone).

    Attributes:
        text: what it means.
        kind: ``block``, ``ramp`` (from the first colour to the last), ``line``, or one of Plotly's symbols.
        colours: names of the theme.
        lined: whether a line goes through the symbol.
    """

    text: str
    kind: str
    colours: tuple[str, ...]
    lined: bool = False


@dataclass(frozen=True)
class State:
    """One state of a figure that the reader can choose: a layer or a view.

    Attributes:
        name: what the reader chooses.
        label: the text alternative in this state.
        data: what the traces have otherwise, one patch per trace.
        layout: what the layout has otherwise.
        arrays: binary arrays that the page's script makes traces from.
        lines: sentences above the figure in this state.
    """

    name: str
    label: str
    data: Sequence[dict[str, Any]] = ()
    layout: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        name: identifies it in the page.
        title: its heading.
        label: the text alternative; with ``states`` the one of the state that is shown.
        data: Plotly traces; colours may be names of the theme such as ``@text``.
        layout: Plotly layout.
        height: in pixels.
        states: what the reader can choose between, empty for a figure that does not change.
        choice: ``layer`` (one state for each layer, chosen for all such figures at once) or ``view``.
        narrow: what the layout has otherwise on a phone.
        decode: name of the script's function that makes traces from ``arrays``, where they would be too large.
        arrays: binary arrays for it, the same in all states.
        legend: what its colours and symbols mean.
        lines: sentences below the figure.
        table: its numbers.
        wide: whether it takes the page's full width.
        square: whether it is to be no higher than wide.
    """

    name: str
    title: str
    label: str
    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    states: tuple[State, ...] = ()
    choice: Literal["layer", "view"] = "view"
    narrow: dict[str, Any] = field(default_factory=dict)
    decode: str | None = None
    arrays: dict[str, Any] = field(default_factory=dict)
    legend: tuple[Swatch, ...] = ()
    lines: tuple[str, ...] = ()
    table: Table | None = None
    wide: bool = True
    square: bool = False

    def document(self) -> dict[str, Any]:
        """What the page's script needs to draw it."""
        states = [
            {"label": s.label, "data": list(s.data), "layout": s.layout, "arrays": s.arrays, "lines": s.lines}
            for s in self.states
        ]
        return {
            "name": self.name,
            "data": list(self.data),
            "layout": self.layout,
            "height": self.height,
            "square": self.square,
            "wide": self.wide,
            "narrow": self.narrow,
            "decode": self.decode,
            "arrays": self.arrays,
            "choice": self.choice,
            "states": states,
        }


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: identifies it in the page.
        title: its heading.
        lead: one sentence on what one sees and how to read it.
        figures: its plots.
        tables: tables that belong to no plot.
        notes: what else a reader should know.
    """

    name: str
    title: str
    lead: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def layer_states(self) -> tuple[State, ...]:
        """What the reader chooses between where a figure shows one layer at a time."""
        found = (figure.states for figure in self.figures if figure.choice == "layer")
        return max(found, key=len, default=())

    @property
    def by_layer(self) -> bool:
        """Whether the reader chooses a layer to be shown."""
        return len(self.layer_states) > 1


def packed(values: NDArray[Any] | Sequence[float]) -> dict[str, str]:
    """An array in the binary form that Plotly reads: floats become float32, where NaN stands for no value."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    code = _CODES[array.dtype.name]
    document = {"dtype": code, "bdata": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")}
    return document if array.ndim == 1 else {**document, "shape": ", ".join(map(str, array.shape))}


def smallest_integers(values: NDArray[np.integer], largest: int) -> NDArray[Any]:
    """Whole numbers from 0 to ``largest`` in the smallest type that Plotly reads."""
    kind = np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32
    return values.astype(kind)


def layer_axis(layers: Sequence[str], **changes: Any) -> dict[str, Any]:
    """A horizontal axis of layers, for bars: no more labels than fit side by side."""
    axis = {"title": {"text": "layer"}, "type": "category", "showgrid": False, "tickangle": 0, "nticks": 25}
    return {**axis, "range": [-0.6, len(layers) - 0.4], **changes}


def plain(text: object) -> str:
    """Text for a place where Plotly would interpret tags and entities."""
    return html.escape(str(text), quote=False)


def in_template(text: object) -> str:
    """Text for the inside of a hover template, where Plotly would also fill in what stands in ``%{...}``."""
    return plain(text).replace("%{", "% {")


def shortened(name: str, length: int = 28) -> str:
    """A name that fits beside an axis: its end, which tells most of a path."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def number(value: float, digits: int = 3) -> str:
    """A number with as many significant digits, without exponent where it is readable so."""
    if value != 0 and math.isfinite(value) and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    if value == 0 or abs(value) >= 1000:
        return f"{value:z,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def sentence(text: str) -> str:
    """Text of another origin, with a full stop."""
    text = text.strip()
    return text if not text or text[-1] in ".!?" else f"{text}."


def with_interval(text: str, estimate: Estimate) -> str:
    """An estimate's text with the ends of its interval, where they are known."""
    return f"{text} [{number(estimate.low)}, {number(estimate.high)}]" if estimate.has_interval else text
