"""Write docs/cli.md, the reference of the command, from the command itself. Run it by ``make docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument

from shape_moe.cli.main import VERBS, command

FILE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The command line

<!-- Written by scripts/make_cli_reference.py from the command itself (make docs); changes here are lost. -->

`shape-moe VERB --help` shows what a first user needs, `--help-all` everything that is on this page.
`shape-moe --install-completion` teaches your shell (bash, zsh, fish or PowerShell) to complete verbs and options.

- Shares are written `60%` or `0.6`, sizes `24GiB` or `80GB`, numbers of tokens `16k` or `8192`.
- A model is a folder, a name on the Hugging Face hub (`--revision` picks a branch, tag or commit), or `embedded`,
  the small model that ships with the package. A data set on the hub takes its revision after its name:
  `NAME@REVISION`.
- Results go to stdout, everything else to stderr.
- See also [exit codes](exit-codes.md), and [tokens, caches and revisions](environment.md).

| verb | what it does |
| --- | --- |
"""


def text() -> str:
    """The whole page."""
    commands = typer.main.get_command(command()).commands
    rows = [f"| [`{verb}`](#{verb}) | {summary} |\n" for verb, summary in VERBS.items()]
    return HEAD + "".join(rows) + "".join(_verb(verb, commands[verb]) for verb in VERBS)


def _verb(verb: str, parsed: Any) -> str:
    arguments = [param for param in parsed.params if isinstance(param, TyperArgument)]
    options = [param for param in parsed.params if param not in arguments and param.name != "help_all"]
    usage = " ".join(["shape-moe", verb, *map(_place, arguments), "[OPTIONS]"])
    about, _, example = parsed.help.strip().partition("Example:")
    about = "\n\n".join(" ".join(paragraph.split()) for paragraph in about.split("\n\n") if paragraph.strip())
    lines = [f"\n## {verb}\n", about, f"\n```bash\n{usage}\n{' '.join(example.split())}\n```\n"]
    lines += [f"- `{param.metavar or param.name.upper()}`: {_escaped(param.help)}" for param in arguments]
    panels: dict[str, list[Any]] = {}
    for param in options:
        panels.setdefault(getattr(param, "rich_help_panel", None) or "", []).append(param)
    for panel, members in sorted(panels.items(), key=lambda entry: entry[0] != ""):
        lines.append(f"\n{panel or 'Options'}:\n")
        lines += [_option(param) for param in members]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _place(param: Any) -> str:
    name = (param.metavar or param.name.upper()) + ("..." if param.nargs == -1 else "")
    return name if param.required else f"[{name}]"


def _option(param: Any) -> str:
    names = sorted([*param.opts, *param.secondary_opts], key=lambda name: not name.startswith("--"))
    value = f" {param.metavar}" if param.metavar else ""
    shown = ", ".join([f"`{names[0]}{value}`", *(f"`{name}`" for name in names[1:])])
    notes = " **Required.**" if param.required else ""
    plain = isinstance(param.default, str | int | float) and not isinstance(param.default, bool)
    if plain and param.show_default:
        notes += f" Default: {param.default:,}." if isinstance(param.default, int) else f" Default: {param.default}."
    return f"- {shown}: {_escaped(param.help)}{notes}"


def _escaped(words: str | None) -> str:
    return re.sub(r"([*<>|])", r"\\\1", words or "")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if FILE.read_text(encoding="utf-8") == text() else f"{FILE} is not current: run make docs.")
    FILE.write_text(text(), encoding="utf-8")
