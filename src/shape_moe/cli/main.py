"""The command ``shape-moe``: verbs, and errors in one sentence."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.text import Text

import shape_moe
from shape_moe.cli.console import new_console
from shape_moe.cli.flag_groups import with_flags
from shape_moe.cli.help import Overview, command_class, with_help_all
from shape_moe.errors import InterruptError, ShapeMoeError, full_disk
from shape_moe.made_with import command_line
from shape_moe.process_exit import leave
from shape_moe.text import printable

VERBS = {
    "inspect": "Show a model's experts, its size at each keep rate, and what fits your memory.",
    "trace": "Record how a model routes a calibration set.",
    "convert": "Turn server responses and other tools' files into traces and selections, and back.",
    "merge": "Put several traces of one model together.",
    "score": "Show what each expert is worth.",
    "select": "Choose the experts to keep.",
    "measure": "Measure what each layer's cut costs, for rule measured.",
    "sweep": "Find out which keep rate is safe.",
    "prune": "Do the whole job: trace, choose, and write a checkpoint without the other experts.",
    "serve": "Serve the original with vLLM as if it had been pruned.",
    "verify": "Check that a pruned checkpoint is what it claims to be.",
    "evaluate": "Judge pruned models beside the dense one.",
    "families": "List the model families that are known, and what is supported of each.",
    "presets": "List the benchmarks whose examples are known by name.",
    "experiment": "Run a grid of pruning experiments from one YAML file.",
    "report": "Write an HTML report.",
    "doctor": "Check this machine in two minutes, for a bug report.",
    "demo": "See all of it on a small embedded model, offline.",
}
"""What each verb does, for the overview. The module of a verb is imported only when that verb is run."""
COMPLETION = "_SHAPE_MOE_COMPLETE"
"""The variable in which a shell asks for completions."""
_DISK_ERRORS = (errno.EROFS, errno.EIO)
# Typer brings its own copy of click or uses the installed one; this is the base class of whichever it is.
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def command(verb: str | None = None) -> typer.Typer:
    """The command with the options of one verb, None for all of them; the others are there by name."""
    app = typer.Typer(
        name="shape-moe",
        cls=Overview,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        add_completion=True,
        callback=_root,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    for name, summary in VERBS.items():
        if verb in {name, None}:
            module = import_module(f"shape_moe.cli.{name}")
            function = with_flags(getattr(module, name), **getattr(module, "HELPS", {}))
            settings, first = getattr(module, "SETTINGS", None), getattr(module, "FIRST", {})
            app.command(name, cls=command_class(first), short_help=summary, context_settings=settings)(
                with_help_all(_interruptible(function), short=bool(first))
            )
        else:
            app.command(name, short_help=summary)(_elsewhere)
    return app


def _elsewhere() -> None:
    """Stands for a verb that this run is not about."""


def _interruptible(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Typer turns Ctrl-C into a bare exit code; what the interrupt says of what was kept would be lost."""

    @wraps(verb)
    def call(**values: Any) -> Any:
        try:
            return verb(**values)
        except KeyboardInterrupt as interrupt:
            raise InterruptError.by(interrupt) from interrupt

    return call


def _show_version(wanted: bool) -> None:  # the signature that Typer calls
    if wanted:
        typer.echo(f"shape-moe {shape_moe.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make sparse Mixture-of-Experts language models fit your hardware.

    The whole job: [bold]shape-moe prune MODEL --data TASK.jsonl --keep 60% -o SMALLER[/bold]

    See it work first, offline, in about a minute: [bold]shape-moe demo[/bold]
    """
    del version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Never: leaves with exit code 0 (done), 1 (failed), 2 (wrong usage) or 130 (Ctrl-C).
    """
    leave(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors of the program itself are raised."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    verb = next((word for word in [*words, *_words_to_complete()] if not word.startswith("-")), "")
    try:
        with command_line(words):
            code = command(verb)(args=words, prog_name="shape-moe", standalone_mode=False)
            sys.stdout.flush()  # a full disk shows here rather than when the interpreter ends
    except _USAGE_ERROR as error:
        error.message = printable(error.message)
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort) as interrupt:
        return _fail(InterruptError.by(interrupt))
    except ShapeMoeError as error:
        return _fail(error)
    except Exception as error:
        message = _sentence(error)
        if message is None:
            raise
        return _fail(ShapeMoeError(message))
    return code if isinstance(code, int) else 0


def _words_to_complete() -> list[str]:
    """What a shell that asks for completions has on its line, behind the command's own name."""
    if COMPLETION not in os.environ:
        return []
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()[1:]


def _sentence(error: BaseException) -> str | None:
    """What a user can do about an error, None for one that is the program's own."""
    if full_disk(error):
        return "The disk is full, or the limit on what may be written is reached: free some space and try again."
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "The device ran out of memory; lower --batch-size or --max-length, or use --device auto."
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in _DISK_ERRORS):
        return f"{error.strerror}: {error.filename or 'the output'}."
    return None


def _fail(error: ShapeMoeError) -> int:
    word = Text() if isinstance(error, InterruptError) else Text("Error: ", style="bold red")
    new_console(stderr=True).print(word + Text(str(error)))
    return error.exit_code
