"""Write docs/api.md, the reference of the Python package, from its docstrings. Run it by ``make docs``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import shape_moe

FILE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# The Python package

<!-- Written by scripts/make_api_reference.py from the docstrings (make docs); changes here are lost. -->

Everything on this page is imported as `shape_moe.NAME`. Importing the package is quick (torch and Transformers are
imported when something needs them), and from then on `AutoModelForCausalLM.from_pretrained` loads pruned checkpoints.
The [quickstart](quickstart.md#from-python) shows how the functions fit together.

What goes wrong is a `shape_moe.errors.ShapeMoeError` with one sentence that says what to do; a wrong request is its
subclass `UsageError`. Messages name the options of the command; a note at the error says what they are in Python.
"""


def text() -> str:
    """The whole page."""
    named = {name: getattr(shape_moe, name) for name in shape_moe.__all__ if not name.startswith("__")}
    functions = {name: found for name, found in named.items() if not inspect.isclass(found)}
    classes = {name: found for name, found in named.items() if inspect.isclass(found)}
    parts = [HEAD, "## Functions\n", *(_entry(name, found) for name, found in functions.items())]
    return (
        "\n".join([*parts, "## Classes\n", *(_entry(name, found) for name, found in classes.items())]).rstrip() + "\n"
    )


def _entry(name: str, found: Any) -> str:
    about = inspect.cleandoc(inspect.getdoc(found) or "")
    body = "\n".join(["```python", _signature(name, found), "```", "", _markdown(about)])
    return f"### {name}\n\n{body}\n{_methods(found) if inspect.isclass(found) else ''}"


def _signature(name: str, found: Any) -> str:
    if dataclasses.is_dataclass(found):
        rows = [f"    {entry.name}: {entry.type}{_default(entry)}," for entry in dataclasses.fields(found)]
    else:
        rows = [f"    {parameter}," for parameter in inspect.signature(found).parameters.values()]
        if any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in inspect.signature(found).parameters.values()):
            place = next(
                i for i, p in enumerate(inspect.signature(found).parameters.values()) if p.kind is p.KEYWORD_ONLY
            )
            rows.insert(place, "    *,")
    returns = "" if inspect.isclass(found) else _returned(found)
    rows = [re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "...", re.sub(r": '([^']*)'", r": \1", row)) for row in rows]
    return "\n".join([f"{name}(", *rows, f"){returns}"])


def _returned(found: Any) -> str:
    annotation = inspect.signature(found).return_annotation
    return "" if annotation is inspect.Signature.empty else f" -> {annotation}"


def _default(entry: Any) -> str:
    if entry.default is not dataclasses.MISSING:
        return f" = {entry.default!r}"
    return " = ..." if entry.default_factory is not dataclasses.MISSING else ""


def _methods(found: Any) -> str:
    rows = []
    for name, member in vars(found).items():
        kind = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        about = inspect.getdoc(member)
        if not name.startswith("_") and about and (inspect.isfunction(kind) or isinstance(member, property)):
            call = "" if isinstance(member, property) else "()"
            rows.append(f"- `{name}{call}`: {_markdown(about.splitlines()[0])}")
    return "\n".join(["", *rows, ""]) if rows else ""


def _markdown(about: str) -> str:
    """Docstrings as Markdown: sections become paragraphs, and their entries lists."""
    lines: list[str] = []
    for line in about.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):", line):
            lines += [f"**{line[:-1].replace('Args', 'Arguments')}**", ""]
        elif entry := re.match(r"    (\*{0,2}[\w, ]+)(?: \([^)]*\))?: (.*)", line):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            inside = line.startswith("    ") and lines and lines[-1].startswith(("- ", "  "))
            lines.append(f"  {line.strip()}" if inside else line.strip())
    joined = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", "\n".join(lines))
    return joined.replace("``", "`")


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
