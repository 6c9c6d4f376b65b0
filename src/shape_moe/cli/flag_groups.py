"""Options that several verbs share, as dataclasses: Typer sees each field as an option of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

from typer.models import OptionInfo


def with_flags(function: Callable[..., Any], **helps: str) -> Callable[..., Any]:
    """Expand parameters whose type is a flag group into that group's options, as Typer wants them.

    Args:
        function: the verb.
        helps: what options of a group say to this verb's users, by the names of their fields, where the group's own
            words are for several verbs.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for entry in fields(groups[name]):
            default = inspect.Parameter.empty if entry.default is MISSING else entry.default
            kind = inspect.Parameter.KEYWORD_ONLY
            hint = _with_help(types[entry.name], helps.pop(entry.name, None))
            parameters.append(inspect.Parameter(entry.name, kind, default=default, annotation=hint))
    if helps:
        raise TypeError(f"{function.__name__} has no group with the option {', '.join(helps)}")

    @wraps(function)
    def call(**values: Any) -> Any:
        built = {
            name: group(**{entry.name: values.pop(entry.name) for entry in fields(group)})
            for name, group in groups.items()
        }
        return function(**values, **built)

    ordered = _by_panel(sorted(parameters, key=lambda parameter: parameter.kind))
    call.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]  # what Typer looks at
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return call


def _by_panel(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """The parameters panel by panel; a panel stands where its last option stood, so later groups can complete it.

    All of them are passed by name, and a parameter without a default may follow one that has one.
    """
    panels = [getattr(_option_of(parameter.annotation), "rich_help_panel", None) for parameter in parameters]
    last = {panel: place for place, panel in enumerate(panels)}
    order = sorted(range(len(parameters)), key=lambda place: last[panels[place]])
    return [parameters[place].replace(kind=inspect.Parameter.KEYWORD_ONLY) for place in order]


def _option_of(hint: Any) -> OptionInfo | None:
    """The ``typer.Option`` of an annotation, None where it has none."""
    return next((entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, OptionInfo)), None)


def _with_help(hint: Any, text: str | None) -> Any:
    """An annotation whose option says something else of itself."""
    option = _option_of(hint)
    if option is None or text is None:
        return hint
    changed = copy(option)
    changed.help = text
    return Annotated[hint.__origin__, changed]


def changed_flags(group: Any) -> list[str]:
    """The options of a group that the user set to something else than their default, as they are typed."""
    hints = get_type_hints(type(group), include_extras=True)
    changed = [entry.name for entry in fields(group) if getattr(group, entry.name) != entry.default]
    return [_option_name(name, hints[name]) for name in changed]


def _option_name(field_name: str, hint: Any) -> str:
    """The first long name that a field's ``typer.Option`` declares; without one Typer takes the field's own name."""
    option = _option_of(hint)
    if option is not None:
        # inside Annotated, Typer's first argument is a name, though its parameter is called default
        for name in (option.default, *(option.param_decls or ())):
            if isinstance(name, str) and name.startswith("--"):
                return name.split("/")[0]
    return f"--{field_name.replace('_', '-')}"
