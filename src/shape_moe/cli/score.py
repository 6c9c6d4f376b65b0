"""``shape-moe score``: values of experts as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shape_moe.cli.choice_flags import ScoreFlags
from shape_moe.cli.console import plain_table
from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.flags import ForceFlag, OutputFlags, SeedFlag
from shape_moe.errors import UsageError
from shape_moe.jobs import select as job
from shape_moe.output_file import OutputFile
from shape_moe.scoring.registry import scorers
from shape_moe.scoring.scores import Scores
from shape_moe.workspace import write_text

FIRST = {
    "scorer": "How experts are valued.",
    "list_scorers": "",
    "csv": "Write every value into this CSV file.",
    "top": "Show this many experts per layer.",
    "force": "Replace an earlier result.",
    "as_json": "Print one JSON object on stdout.",
    "quiet": "No progress and no notes.",
}
"""What --help shows, shortly; --help-all shows the rest."""


def score(
    flags: ScoreFlags,
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    source: Annotated[
        str | None, typer.Argument(metavar="TRACE", help="A trace, or a table of values (VALUES.csv).")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every value into this CSV file.")] = None,
    top: Annotated[int, typer.Option(help="Show this many experts per layer.")] = 5,
    list_scorers: Annotated[bool, typer.Option("--list", help="List the scorers and exit.")] = False,
) -> None:
    """Show what each expert is worth.

    Example: shape-moe score traces/gsm8k --scorer shape --csv values.csv
    """
    talk = output.output()
    if list_scorers:
        found = scorers(converted=True)
        talk.result({name: entry.summary for name, entry in found.items()}, _show_scorers)
        return
    if source is None:
        raise UsageError("Name a trace or a table of values.")
    if job.is_table(source) and changed_flags(flags):
        raise UsageError(f"{source} holds values already: leave {', '.join(changed_flags(flags))} out.")
    options = flags.options(seed.seed)
    with OutputFile(csv, force=force.force, inputs=[source]):
        scores = job.score(job.opened(source, talk), flags.named, options)
        if csv is not None:
            write_text(csv, scores.table().write_csv())
            talk.note(f"Wrote {csv}")
    document = {
        "scorer": scores.scorer,
        "layers": list(scores.layers),
        "values": scores.values.tolist(),
        "activations": scores.activations.tolist(),
    }
    if scores.joined:
        talk.note(
            "Values are shares of their layer: the largest that an expert has in any class. --pool-classes adds the "
            "classes up; rule global compares shares of the whole model, which select takes from the trace itself."
        )
    talk.result(document, lambda console: _show(console, scores, top))


def _show_scorers(console: Console) -> None:
    table = plain_table("scorer", "value")
    table.columns[1].justify = "left"
    for name, entry in scorers(converted=True).items():
        table.add_row(name, entry.summary)
    console.print(table)


def _show(console: Console, scores: Scores, top: int) -> None:
    table = plain_table("layer", "best experts (value)", "never used", title=f"Scorer {scores.scorer}")
    table.columns[1].justify = "left"
    rows = scores.table()
    for layer, values in zip(scores.layers, scores.activations, strict=True):
        best = rows.filter(rows["Layer"] == layer).head(top)
        names = "  ".join(
            f"{expert} ({value:.4g})" for expert, value in best.select("Expert_ID", "Shapley_Value").iter_rows()
        )
        table.add_row(str(layer), names, str(int((values <= 0).sum())))
    console.print(table)
