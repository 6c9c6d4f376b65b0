"""``shape-moe demo``: all of it on the embedded model, offline."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from shape_moe.cli.console import plain_table
from shape_moe.cli.flags import ForceFlag, OutputFlags, SeedFlag
from shape_moe.cli.values import share_option
from shape_moe.demo.tasks import TASKS
from shape_moe.units import readable_size

if TYPE_CHECKING:
    from shape_moe.demo.run import DemoResult


def demo(
    seed: SeedFlag,
    force: ForceFlag,
    output: OutputFlags,
    task: Annotated[str, typer.Option(help=f"Task to trace: {', '.join(TASKS)}.")] = "addition",
    rule: Annotated[str, typer.Option(help="How layers share the budget: coverage, uniform, global.")] = "coverage",
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
    document = {
        "task": task,
        "rule": rule,
        "seed": seed.seed,
        "rows": [vars(row) for row in found.rows],
        "report": str(found.report) if found.report is not None else None,
    }
    talk.result(document, lambda console: _show(console, found, task, rule))


def _show(console: Console, found: DemoResult, task: str, rule: str) -> None:
    title = f"Embedded model traced on {task}, rule {rule}: exact match on held-out prompts"
    table = plain_table("scorer", "keep", "weights", task, "other tasks", title=title)
    for keep, group in groupby(found.rows, key=lambda row: round(row.keep, 2)):
        for row in sorted(group, key=lambda row: (-row.on_task, -row.off_task, row.scorer)):
            cells = (row.scorer, f"{keep:g}", readable_size(row.size), f"{row.on_task:.0%}", f"{row.off_task:.0%}")
            table.add_row(*cells, style="bold" if row.scorer in {"dense", "shape"} else None)
        table.add_row()
    console.print(table)
    if found.report is not None:
        console.print(f"Report on what scorer shape keeps: [bold]{escape(str(found.report))}[/bold]")
    console.print(
        "One task is kept, the others fade: that is the bargain. On your own model: "
        "shape-moe prune MODEL --data TASK.jsonl --keep 0.8 -o SMALLER"
    )
