"""Help in two lengths: ``--help`` shows what a first user needs, ``--help-all`` every option."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from functools import wraps
from typing import Annotated, Any, ClassVar, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.models import OptionInfo

_HELP_ALL = "help_all"
_EVERYTHING = "shape_moe.everything"


class Overview(TyperGroup):
    """The command itself, whose help lists the verbs."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters; switches show no type."""
        return _without_types(super().get_params(ctx))


class VerbCommand(TyperCommand):
    """A verb whose ``--help`` shows the options in :attr:`first`, in that order; all of them where it names none.

    Attributes:
        first: what options say in the short help, by the names of their parameters; nothing for what they say anyway.
    """

    first: ClassVar[Mapping[str, str]] = {}

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, of which arguments and switches show no type: their names say it."""
        return _without_types(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the short help, or the whole one where ``--help-all`` asks for it."""
        whole = ctx.meta.get(_EVERYTHING, False) or not self.first
        super(VerbCommand, self if whole else self._short()).format_help(ctx, formatter)

    def _short(self) -> VerbCommand:
        """The command as a first user sees it: one panel of the options that matter first."""
        known = {param.name: param for param in self.params}
        if unknown := [name for name in self.first if name not in known]:
            raise TypeError(f"{self.name} has no option {', '.join(unknown)}")
        arguments = [param for param in self.params if isinstance(param, TyperArgument)]
        short = copy(self)
        short.params = [*arguments, *(_brief(known[name], said) for name, said in self.first.items()), known[_HELP_ALL]]
        return short


def _brief(param: Any, said: str) -> Any:
    brief = copy(param)
    brief.rich_help_panel = None
    if said:
        brief.help, brief.show_default = said, False
    return brief


def _without_types(params: list[Any]) -> list[Any]:
    for param in params:
        if isinstance(param, TyperArgument) or getattr(param, "is_flag", False):
            vars(param)["display_type_rich"] = _no_type
    return params


def _no_type(ctx: Any) -> str:
    del ctx
    return ""


def command_class(first: Mapping[str, str]) -> type[VerbCommand]:
    """The class of a verb's command, for its :attr:`VerbCommand.first`."""
    return type("VerbCommand", (VerbCommand,), {"first": first})


def with_help_all(function: Callable[..., Any], *, short: bool) -> Callable[..., Any]:
    """Add ``--help-all`` to a verb; where it has no short help, the option is there but not shown."""

    def show(context: typer.Context, wanted: bool) -> None:  # the signature that Typer calls
        if wanted:
            context.meta[_EVERYTHING] = True
            typer.echo(context.get_help())
            raise typer.Exit

    count = len(inspect.signature(function).parameters)
    option = typer.Option(
        "--help-all",
        help=f"Show all {count} arguments and options.",
        is_eager=True,
        callback=show,
        hidden=not short,
        metavar="",
    )
    parameters = [_readable(p) for p in inspect.signature(function).parameters.values()]
    added = inspect.Parameter(
        _HELP_ALL, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )

    @wraps(function)
    def call(**values: Any) -> Any:
        values.pop(_HELP_ALL, None)
        return function(**values)

    call.__signature__ = inspect.Signature([*parameters, added])  # type: ignore[attr-defined]  # what Typer looks at
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, added]}
    return call


def _readable(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter whose value has a name in help rather than a Python type; a switch has none."""
    hint = parameter.annotation
    info = next((entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, OptionInfo)), None)
    if info is None or info.metavar is not None:
        return parameter
    named = copy(info)
    named.metavar = _value_name(hint.__origin__)
    return parameter.replace(annotation=Annotated[hint.__origin__, named])


def _value_name(kind: Any) -> str:
    """What stands for the value of an option: N for numbers, PATH for paths, nothing for switches."""
    kinds = [entry for entry in get_args(kind) if entry is not type(None)] or [kind]
    inner = kinds[0]
    if get_origin(inner) is list:
        inner = get_args(inner)[0]
    return {"bool": "", "int": "N", "float": "NUMBER", "Path": "PATH"}.get(getattr(inner, "__name__", ""), "NAME")
