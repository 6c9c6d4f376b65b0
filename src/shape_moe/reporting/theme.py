"""The report's colours: one palette for light pages and paper, one for dark pages.

Styles use them as CSS variables (``--text``); figures name them with an at-sign (``@text``), so that a figure that was
drawn can change its colours with the page.
"""

from __future__ import annotations

LIGHT = {
    "page": "#f4f6f8",
    "surface": "#ffffff",
    "inset": "#f7f9fa",
    "text": "#17212b",
    "muted": "#52606d",
    "line": "#d8dee5",
    "grid": "#e7ebef",
    "accent": "#0b6570",
    "accent-soft": "#e2f1f2",
    "kept": "#137a85",
    "kept-low": "#a5d8d6",
    "kept-high": "#063c46",
    "dropped": "#c3cad2",
    "dropped-low": "#f1f3f5",
    "dropped-high": "#bfc6ce",
    "mark": "#b3500b",
    "faint": "#aeb8c2",
    "less": "#2264b0",
    "neutral": "#f3f4f6",
    "more": "#b3500b",
    "unknown": "#dfe3e8",
    "sequence-low": "#f3f8f8",
    "sequence-high": "#62b6bb",
    "lost-1": "#f5d3ad",
    "lost-2": "#e6a565",
    "lost-3": "#c9742a",
    "lost-4": "#8c430c",
    "warn-back": "#fff6e3",
    "warn-text": "#5f3b00",
    "warn-line": "#d08a12",
    "good": "#1c7a3f",
    "fair": "#0b6570",
    "bad": "#b3261e",
    "series-1": "#137a85",
    "series-2": "#b3500b",
    "series-3": "#6a4bb3",
    "series-4": "#2264b0",
    "series-5": "#5f7010",
    "series-6": "#a62c78",
}
DARK = {
    "page": "#0f1419",
    "surface": "#171d24",
    "inset": "#1c232b",
    "text": "#e7ecf1",
    "muted": "#a5b1bd",
    "line": "#2e3843",
    "grid": "#262f39",
    "accent": "#66cbd3",
    "accent-soft": "#16333a",
    "kept": "#3fb4bd",
    "kept-low": "#1d626b",
    "kept-high": "#b4f4f1",
    "dropped": "#47525e",
    "dropped-low": "#20272f",
    "dropped-high": "#4b5763",
    "mark": "#f4a461",
    "faint": "#53606d",
    "less": "#7ab4f5",
    "neutral": "#232b34",
    "more": "#f4a461",
    "unknown": "#39434e",
    "sequence-low": "#1b252d",
    "sequence-high": "#20646c",
    "lost-1": "#5b4632",
    "lost-2": "#926738",
    "lost-3": "#cc9250",
    "lost-4": "#fbd3a0",
    "warn-back": "#2f260f",
    "warn-text": "#f6d795",
    "warn-line": "#b58a20",
    "good": "#6fd08c",
    "fair": "#66cbd3",
    "bad": "#ff8f85",
    "series-1": "#4cc3cb",
    "series-2": "#f4a461",
    "series-3": "#b7a0f5",
    "series-4": "#7ab4f5",
    "series-5": "#bccb5f",
    "series-6": "#ee90c5",
}
SERIES = tuple(f"@{name}" for name in LIGHT if name.startswith("series-"))
"""Colours of series, in the order in which they are given out."""


def css_variables(palette: dict[str, str]) -> str:
    """A palette as CSS declarations."""
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())
