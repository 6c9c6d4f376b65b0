"""``shape-moe demo``: all of it on the embedded model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shape_moe.cli.console import plain_table, show_commands
from shape_moe.cli.flags import ForceFlag, OutputFlags, SeedFlag
from shape_moe.cli.values import share_option
from shape_moe.demo.tasks import TASKS
from shape_moe.reporting.demo_rows import (
    demo_command,
    demo_headings,
    demo_headline,
    demo_levels,
    demo_model,
    demo_short,
)
from shape_moe.units import capitalised, readable_share, readable_size

if TYPE_CHECKING:
    from shape_moe.demo.run import DemoResult


def demo(
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    task: Annotated[str, typer.Option(help=f"Task to trace: {', '.join(TASKS)}.")] = "addition",
    rule: Annotated[
        str, typer.Option(help="How layers share the experts that are kept: coverage, uniform or global.")
    ] = "coverage",
    keep: Annotated[
        list[float] | None,
        share_option(
            "--keep", "60%", help="A keep rate, such as 60% or 0.6; can be repeated. Default: 0.8, 0.6, 0.4 and 0.25."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Keep the trace, the checkpoints and a report here."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every scorer at every keep rate.")] = False,
) -> None:
    """Prune a small trained model for one of its six tasks, by every scorer, and see what is left of it.

    Example: shape-moe demo --task sorting
    """
    from shape_moe.demo.run import CALIBRATION_EXAMPLES, KEEP_RATES, run_demo

    talk = output.output()
    if task in TASKS:
        talk.note(f"{TASKS[task].description}: {CALIBRATION_EXAMPLES} examples")
    rates = tuple(keep or KEEP_RATES)
    found = run_demo(task, rule=rule, keep_rates=rates, seed=seed.seed, folder=out, force=force.force, progress=talk)
    document = {**found.document, "report": str(found.report) if found.report is not None else None}
    talk.result(document, lambda console: _show(console, found, every=every))


def _show(console: Console, found: DemoResult, *, every: bool) -> None:
    """A table, and a sentence that says what it comes to."""
    document = found.document
    if every:
        console.print(_every_row(document))
        console.print()
    headings, rows = demo_headings(document), demo_short(document)
    table = plain_table(*headings)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if found.report is not None:
        console.print(f"Report: [bold]{escape(str(found.report))}[/bold]")
    if not every:
        console.print("All scorers: shape-moe demo --all")
    console.print(f"[bold]{escape(demo_headline(document))}.[/bold]")
    console.print("On your own model, which may bear more or less; the command ends with a verdict:", markup=False)
    show_commands(console, [demo_command(document)])


def _every_row(document: dict[str, Any]) -> Table:
    """Every scorer at every keep rate, the best first."""
    task = str(document["task"])
    title = f"{capitalised(demo_model(document))} traced on {task}, rule {document['rule']}: right held-out answers"
    table = plain_table("scorer", "kept", "weights", task, "other tasks", title=title)
    for keep, rows in demo_levels(document):
        for row in rows:
            shown = (readable_share(float(row[key])) for key in ("on_task", "off_task"))
            table.add_row(str(row["scorer"]), readable_share(keep), readable_size(row["size"]), *shown)
        table.add_row()
    return table
