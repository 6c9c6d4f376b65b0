"""What the automatic choice tried, and what every layer's cut costs by itself where that was measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from shape_moe.evaluation.intervals import Estimate
from shape_moe.reporting.figures.figure import Figure, Section, Table, layer_axis, sentence
from shape_moe.reporting.material import Material
from shape_moe.selection.layer_curves import LayerCurves
from shape_moe.selection.selection import Selection
from shape_moe.units import NONE, counted, named_share, readable_kl, readable_points


def choice_section(material: Material) -> Section | None:
    """The candidates among which a selection was chosen, the best by its figure first; None where none were tried."""
    selection = material.selection
    record = selection.choice if selection is not None and selection.choice is not None else {}
    tried = sorted(record.get("tried") or (), key=lambda entry: (float(entry["loss"]), str(entry["method"])))
    if selection is None or not tried:
        return None
    several = len({entry["keep"] for entry in tried}) > 1
    lead = (
        f"Each row is a way to choose the experts that was tried on {counted(record['examples'], 'example')} held out "
        "for that, the one that stays closest to the dense model first; of several within noise, one that did well in "
        "the benchmark is taken."
    )
    headings = ("Method", "", *(("Kept",) if several else ()), "KL to dense", "Behind the chosen one", "Right answers")
    rows = tuple(_row(entry, record, selection, several=several) for entry in tried)
    caption = "What was tried: KL divergence in nats per token, its difference with a 95 % interval, points of change"
    notes = (sentence(f"Chosen: {record['reason']}"),) if record.get("reason") else ()
    return Section("choice", "How the experts were chosen", lead, (), (Table(caption, headings, rows, texts=2),), notes)


def _row(entry: dict[str, Any], record: dict[str, Any], selection: Selection, *, several: bool) -> tuple[str, ...]:
    chosen = entry["method"] == str(selection.method) and math.isclose(entry["keep"], selection.keep, abs_tol=1e-9)
    word = "chosen" if chosen else "within noise" if entry["method"] in record.get("tied", ()) else ""
    change, behind = entry.get("exact_match_change"), entry.get("behind")
    return (
        str(entry["method"]),
        word,
        *((named_share(entry["keep"]),) if several else ()),
        readable_kl(float(entry["loss"])),
        NONE if chosen or not behind else _signed(Estimate.from_document(behind)),
        readable_points(float(change["value"])) if change else NONE,
    )


def _signed(behind: Estimate) -> str:
    """A difference with its interval; nothing below half a thousandth means anything here."""
    shown = (behind.value, behind.low, behind.high)
    value, *ends = ("0" if abs(end) < 0.0005 else f"{end:+.2g}" for end in shown)
    return f"{value} [{', '.join(ends)}]" if behind.has_interval else value


def curves_figure(curves: LayerCurves, selection: Selection) -> Figure:
    """What every layer loses when it alone is cut to the experts that it keeps, as bars."""
    names, kept = [str(layer) for layer in selection.layers], [len(ids) for ids in selection.layers.values()]
    found = curves.costs()[np.arange(len(kept)), kept]
    costs = [float(cost) if math.isfinite(cost) else None for cost in found]
    most = max(range(len(costs)), key=lambda row: costs[row] or 0.0)
    bars = {"type": "bar", "x": names, "y": costs, "marker": {"color": "@kept"}}
    told = [readable_kl(cost) if cost is not None else NONE for cost in costs]
    return Figure(
        name="curves",
        title="What every layer's cut costs by itself",
        label=f"Bars by layer: cut alone, layer {names[most]} costs most, a KL divergence of {told[most]}.",
        data=[{**bars, "hovertemplate": "layer %{x} alone: KL %{y:.3g}<extra></extra>"}],
        layout={
            "bargap": 0.18,
            "xaxis": layer_axis(names),
            "yaxis": {"title": {"text": "KL to dense, nats"}, "rangemode": "tozero"},
        },
        height=280,
        narrow={"xaxis": {"nticks": 9}},
        lines=("Measured with the calibration examples, all other layers whole, for the class that it costs most.",),
        table=Table(
            "What every layer's cut costs by itself",
            ("Layer", "Kept", "KL to dense"),
            tuple(zip(names, map(str, kept), told, strict=True)),
        ),
    )
