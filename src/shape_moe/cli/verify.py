"""``shape-moe verify``: is this checkpoint what it claims to be?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

import shape_moe
from shape_moe.cli.flags import DeviceFlags, OutputFlags, RevisionFlag

if TYPE_CHECKING:
    from shape_moe.jobs.verify import Check


HELPS = {"revision": "Branch, tag or commit of --original, where it is on the hub. Default: its newest version."}


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned checkpoint.")],
    hub: RevisionFlag,
    run: DeviceFlags,
    output: OutputFlags,
    original: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare every tensor with this original once more.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Check the answers of this OpenAI-compatible server instead of loading the checkpoint."
        ),
    ] = None,
    served_as: Annotated[
        str | None, typer.Option(help="The checkpoint's name on that server. Default: its first model.")
    ] = None,
) -> int:
    """Check a pruned checkpoint: files, config, tensors, tokenizer, and its answers to the canary.

    Example: shape-moe verify ./Qwen3-gsm8k-0.6
    """
    talk = output.output()
    checks = shape_moe.verify(
        folder,
        original=original,
        revision=hub.revision,
        endpoint=endpoint,
        served_as=served_as,
        device=run.place,
        dtype=run.dtype,
        progress=talk,
    )
    passed = all(check.passed is not False for check in checks)
    document = {"checkpoint": str(folder), "passed": passed, "checks": [vars(check) for check in checks]}
    talk.result(document, lambda console: _show(console, checks))
    return 0 if passed else 1


def _show(console: Console, checks: list[Check]) -> None:
    words = {True: Text("ok    ", "green"), False: Text("FAILED", "bold red"), None: Text("skip  ", "yellow")}
    for check in checks:
        console.print(words[check.passed], Text(f"{check.name}: {check.detail}"))
    console.print(
        Text("PASS", "bold green") if all(check.passed is not False for check in checks) else Text("FAIL", "bold red")
    )
