"""Options that several verbs share, as dataclasses: Typer sees each field as an option of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from typer.models import OptionInfo


def with_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Expand parameters whose type is a flag group into that group's options, as Typer wants them."""
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
            parameters.append(inspect.Parameter(entry.name, kind, default=default, annotation=types[entry.name]))

    @wraps(function)
    def call(**values: Any) -> Any:
        built = {
            name: group(**{entry.name: values.pop(entry.name) for entry in fields(group)})
            for name, group in groups.items()
        }
        return function(**values, **built)

    ordered = sorted(parameters, key=lambda parameter: parameter.kind)
    call.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]  # what Typer looks at
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return call


def changed_flags(group: Any) -> list[str]:
    """The options of a group that the user set to something else than their default, as they are typed."""
    hints = get_type_hints(type(group), include_extras=True)
    changed = [entry.name for entry in fields(group) if getattr(group, entry.name) != entry.default]
    return [_option_name(name, hints[name]) for name in changed]


def _option_name(field_name: str, hint: Any) -> str:
    """The first long name that a field's ``typer.Option`` declares; without one Typer takes the field's own name."""
    for entry in getattr(hint, "__metadata__", ()):
        if isinstance(entry, OptionInfo):
            # inside Annotated, Typer's first argument is a name, though its parameter is called default
            for name in (entry.default, *(entry.param_decls or ())):
                if isinstance(name, str) and name.startswith("--"):
                    return name.split("/")[0]
    return f"--{field_name.replace('_', '-')}"
