"""The command ``shape-moe``: verbs, and errors in one sentence."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import shape_moe
from shape_moe.cli import (
    convert,
    demo,
    evaluate,
    experiment,
    inspect,
    merge,
    prune,
    report,
    score,
    select,
    serve,
    sweep,
    trace,
    verify,
)
from shape_moe.errors import ShapeMoeError
from shape_moe.made_with import command_line
from shape_moe.process_exit import leave

_INTERRUPTED = 130  # what Typer makes of Ctrl-C
_GO_ON = "Interrupted; what is complete was kept, and the same command goes on from there."
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Typer brings its own copy of click or uses the installed one; this is the base class of whichever it is.
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="shape-moe",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
_VERBS = (
    inspect,
    trace,
    convert,
    merge,
    score,
    select,
    sweep,
    prune,
    serve,
    verify,
    evaluate,
    experiment,
    report,
    demo,
)
for _module in _VERBS:
    _module.add_to(app)


def _show_version(wanted: bool) -> None:  # the signature that Typer calls
    if wanted:
        typer.echo(f"shape-moe {shape_moe.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make sparse Mixture-of-Experts language models fit your hardware.

    [bold]shape-moe prune MODEL --data TASK.jsonl --keep 0.6 -o SMALLER[/bold] does the whole job;
    [bold]shape-moe demo[/bold] shows it on an embedded model, offline, in about a minute.
    """
    del version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Never: leaves with exit code 0 (done), 1 (failed) or 2 (wrong usage).
    """
    leave(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors of the program itself are raised."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with command_line(words):
            code = app(args=words, standalone_mode=False)
    except _USAGE_ERROR as error:
        error.show()
        return 2
    except (ShapeMoeError, typer.Abort, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        message = _sentence(error)
        if message is None:
            raise
        return _fail(message, getattr(error, "exit_code", 1))
    if code == _INTERRUPTED:
        return _fail(_GO_ON, 1)
    return code if isinstance(code, int) else 0


def _sentence(error: BaseException) -> str | None:
    """What a user can do about an error, None for one that is the program's own."""
    if isinstance(error, ShapeMoeError):
        return str(error)
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return _GO_ON
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "The device ran out of memory; lower --batch-size or --max-length, or use --device auto."
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in _DISK_ERRORS):
        return f"{error.strerror}: {error.filename or 'the output'}."
    return None


def _fail(message: str, code: int) -> int:
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text("Error: ", style="bold red") + Text(message))
    return code
