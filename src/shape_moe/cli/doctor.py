"""``shape-moe doctor``: a two-minute check of this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from shape_moe.cli.flags import OutputFlags


def doctor(
    output: OutputFlags,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU where there is one.")] = None,
    no_imports: Annotated[
        bool, typer.Option("--no-imports", help="Do not try to import engines and libraries, only say which are there.")
    ] = False,
) -> int:
    """Check this machine in about two minutes, and print what belongs into a bug report.

    Versions, memory, accelerators, which engines and libraries there are, and on the small embedded model a trace, a
    trace layer by layer, masks, pruning and reloading. No folder, user or machine is named. Ends with code 1 where
    something fails.

    Example: shape-moe doctor
    """
    from shape_moe.demo.doctor import diagnose

    talk = output.output()
    talk.begin("Loading libraries ...")
    found = diagnose(device, imports=not no_imports, progress=talk)

    def show(console: Console) -> None:
        console.print("Paste this into your report:\n", markup=False)
        console.print("```", markup=False)
        for line in found.lines():
            console.print(line, markup=False, soft_wrap=True)
        console.print("```", markup=False)

    talk.result(found.to_document(), show)
    if not found.passed:
        talk.warn("Something failed; the lines with FAIL say what.")
    return 0 if found.passed else 1
