"""``shape-moe convert``: files of other tools in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import shape_moe
from shape_moe.cli import select, trace
from shape_moe.cli.flags import ForceFlag, OutputFlags, RevisionFlag
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace

HELPS = {"revision": "Branch, tag or commit of --model, where it is on the hub. Default: its newest version."}


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Server responses with routed experts (JSONL), coalition counts or selected experts (JSON), an "
            "imatrix of llama.cpp; or a trace or a selection, for the reference implementation.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for a trace; a file for everything else.")
    ],
    hub: RevisionFlag,
    force: ForceFlag,
    output: OutputFlags,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that the file is about: a folder or a hub name.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="responses, coalitions, selected, imatrix, selection or trace. Default: recognised by its content.",
        ),
    ] = None,
    to: Annotated[str | None, typer.Option(help="shape-moe or reference. Default: the other of the two.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out responses that cannot be used, and count them.")
    ] = False,
) -> None:
    """Turn server responses and other tools' files into traces and selections, and back.

    Example: shape-moe convert responses.jsonl --model ./Qwen3-30B-A3B -o traces/traffic
    """
    talk = output.output()
    result = shape_moe.convert(
        source,
        out,
        model=model,
        revision=hub.revision,
        kind=kind,
        to=to,
        skip_bad=skip_bad,
        force=force.force,
        progress=talk,
    )
    for warning in _warnings(result):
        talk.warn(warning)
    if out.is_file():
        talk.note(f"Wrote {out}")
    talk.result(_document(result, out), lambda console: _show(console, result, out))


def _warnings(result: Trace | Selection) -> list[str]:
    if isinstance(result, Selection):
        return list(result.warnings)
    skipped = result.info.source.get("skipped") or {}
    found = [f"{len(skipped)} responses were skipped; the first: {next(iter(skipped.values()))}"] if skipped else []
    return [*found, *map(str, result.info.source.get("remarks") or ())]


def _document(result: Trace | Selection, out: Path) -> dict[str, Any]:
    return trace.document(result, out) if isinstance(result, Trace) else result.to_document()


def _show(console: Console, result: Trace | Selection, out: Path) -> None:
    if isinstance(result, Trace):
        trace.show(console, result, out)
    else:
        console.print(escape(select.summary(result)))
