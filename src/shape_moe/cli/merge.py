"""``shape-moe merge``: tasks or workers put together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import shape_moe
from shape_moe.cli.flags import ForceFlag, OutputFlags
from shape_moe.cli.trace import document, show


def merge(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE", help="Traces of the same model.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="TRACE", help="Folder for the merged trace.")],
    force: ForceFlag,
    output: OutputFlags,
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of each trace, in order. Default: 1 for all.")
    ] = None,
    pool: Annotated[
        bool,
        typer.Option("--pool", help="The traces are parts of one data set: do not treat each as a class of its own."),
    ] = False,
) -> None:
    """Put several traces of one model together, each with a weight.

    Example: shape-moe merge traces/maths traces/code --weight 1 --weight 2 -o traces/both
    """
    result = shape_moe.merge(traces, out, weights=weight, pool=pool, force=force.force)
    talk = output.output()
    for remark in result.remarks:
        talk.note(remark)
    talk.result(document(result, out), lambda console: show(console, result, out))
