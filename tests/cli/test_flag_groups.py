"""Option groups: a message names an option as the user types it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from shape_moe.cli.flag_groups import changed_flags
from shape_moe.cli.flags import DataFlags, OutputFlags


@dataclass
class Several:
    """Every way to name an option."""

    plain_name: Annotated[int, typer.Option(help="Its field's.")] = 0
    behind: Annotated[int, typer.Option("-b", "--long", "--longer")] = 0
    switch: Annotated[bool, typer.Option("--on/--off")] = True


def test_changed_options_have_the_names_that_users_type() -> None:
    assert changed_flags(OutputFlags(as_json=True, quiet=True)) == ["--json", "--quiet"]
    assert changed_flags(DataFlags(field_map=["prompt=q"], max_new_tokens=0)) == ["--map", "--max-new-tokens"]
    assert changed_flags(Several(1, 1, switch=False)) == ["--plain-name", "--long", "--on"]
    assert changed_flags(Several()) == []
