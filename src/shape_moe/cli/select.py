"""``shape-moe select``: which experts every layer keeps, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.cli.choice_flags import ScoreFlags, SelectFlags
from shape_moe.cli.console import plain_table
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.flags import ForceFlag, OutputFlags, SeedFlag
from shape_moe.cli.values import share_option
from shape_moe.errors import UsageError
from shape_moe.jobs import select as job
from shape_moe.output_file import OutputFile
from shape_moe.selection.selection import Selection
from shape_moe.units import percent, readable_share

FIRST = {
    "keep": "Share of the experts to keep: 60% or 0.6.",
    "out": "",
    "scorer": "How experts are valued (score --list).",
    "rule": "coverage, uniform or global.",
    "target": "ragged: best; stock: loads in any tool.",
    "routing": "drop or reroute.",
    "skip_layers": "Layers that keep every expert: 0,1,47.",
    "protect": "Experts to keep, as LAYER:EXPERT,EXPERT.",
    "force": "Replace an earlier result.",
    "as_json": "Print one JSON object on stdout.",
    "quiet": "No progress and no notes.",
}
"""What --help shows, shortly; --help-all shows the rest."""


def select(
    source: Annotated[str, typer.Argument(metavar="TRACE", help="A trace, or a table of values (VALUES.csv).")],
    keep: Annotated[
        float,
        share_option("--keep", "60%", help="Share of the routed experts to keep, over all layers, such as 60% or 0.6."),
    ],
    flags: SelectFlags,
    score: ScoreFlags,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="SELECTION", help="Write the selection to this file.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts per token; needed to reroute by a table of values.")
    ] = None,
) -> None:
    """Choose the experts to keep.

    Example: shape-moe select traces/gsm8k --keep 0.6 -o selection.json
    """
    talk = output.output()
    scoring = changed_flags(score) + (["--method"] if flags.method else [])
    if job.is_table(source) and scoring:
        raise UsageError(f"{source} holds values already: leave {', '.join(scoring)} out.")
    flags, score = flags.spelled_out(score)
    routing = RouterFacts(top_k, top_k) if top_k else None
    options = flags.options(keep, score, seed.seed)
    with OutputFile(out, force=force.force, inputs=[source, flags.curves]):
        selection = job.select(job.opened(source, talk), options, routing=routing)
        for warning in selection.warnings:
            talk.warn(warning)
        if out is not None:
            selection.save(out)
            talk.note(f"Wrote {out}")
    talk.result(selection.to_document(), lambda console: show(console, selection))


def show(console: Console, selection: Selection) -> None:
    """A selection for a person."""
    table = plain_table("layer", "kept", "of", "share of value kept")
    for layer, ids in selection.layers.items():
        share = selection.mass_kept.get(layer)
        table.add_row(str(layer), str(len(ids)), str(selection.num_experts), "" if share is None else percent(share, 2))
    console.print(table)
    console.print(summary(selection))


def summary(selection: Selection) -> str:
    """A selection in a few lines."""
    rate = f"{readable_share(selection.keep)}; {readable_share(selection.keep_asked)} asked"
    alpha = ""
    if selection.alpha is not None:  # above 1 it says no more than this
        alpha = f", alpha {selection.alpha:.4g}" if selection.alpha <= 1 else ", every expert of value among them"
    first = f"Keeps {selection.kept:,} of {selection.total:,} experts ({rate}) by {selection.method}{alpha}"
    return "\n".join([first, *notes_on(selection)])


def notes_on(selection: Selection) -> list[str]:
    """How sure a selection is."""
    lines = []
    if selection.classes:
        how = "added up" if selection.pooled else "each kept for its own sake (the largest share in any class counts)"
        lines.append(f"{len(selection.classes)} classes, {how}: {', '.join(selection.classes)}")
    if selection.stability is not None:
        lines.append(
            f"Two halves of the data agree on {readable_share(selection.stability['agreement'])} of the kept experts; "
            f"undecided places: {selection.stability['undecided']:,.0f}"
        )
    if selection.near_ties:
        lines.append(f"Near-ties, which rounding on another machine could decide otherwise: {_places(selection)}")
    return lines


def _places(selection: Selection, most: int = 5) -> str:
    """The first near-ties, and how many more there are."""
    every = [f"layer {layer} expert {expert}" for layer, ids in (selection.near_ties or {}).items() for expert in ids]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return f"{', '.join(every[:most])}{more}"
