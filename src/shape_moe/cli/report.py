"""``shape-moe report``: a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

import shape_moe
from shape_moe.cli.flags import ForceFlag, OutputFlags
from shape_moe.units import readable_size

if TYPE_CHECKING:
    from shape_moe.jobs.report import ReportResult


def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="What shape-moe wrote: pruned checkpoints, selections, traces, tables of values, and the folders or "
            "files of sweeps, evaluations, experiments and demos; any number of them.",
        ),
    ],
    force: ForceFlag,
    output: OutputFlags,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file.")] = Path("report.html"),
    selection: Annotated[Path | None, typer.Option(help="Show this selection, where SOURCE does not hold one.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="Add quality against size: a sweep's folder or file.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Add quality, memory and speed: an evaluation's folder or file.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, for its size: a folder, or a name on the hub.")
    ] = None,
) -> None:
    """Write a report as one HTML file: what was kept, why, and what it costs.

    Example: shape-moe report ./Qwen3-gsm8k-0.6 --sweep sweeps/gsm8k -o report.html
    """
    talk = output.output()
    result = shape_moe.report(
        sources,
        out,
        selection=selection,
        sweep=sweep,
        evaluation=evaluation,
        model=model,
        force=force.force,
        progress=talk,
    )
    document = {"report": str(result.path), "sections": list(result.sections), "bytes": result.size}
    talk.result(document, lambda console: _show(console, result))


def _show(console: Console, result: ReportResult) -> None:
    """The file and its sections; those of a second model have the same names with a number."""
    names = dict.fromkeys(name.partition("-")[0] for name in result.sections)
    console.print(f"[bold]{escape(str(result.path))}[/bold]  {readable_size(result.size)}: {', '.join(names)}")
