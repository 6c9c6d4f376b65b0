"""Option groups: a message names an option as the user types it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from shape_moe.cli.data_flags import DataFlags
from shape_moe.cli.flag_groups import changed_flags, with_flags
from shape_moe.cli.flags import OutputFlags


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


@dataclass
class Near:
    """One option in each of two panels."""

    first: Annotated[int, typer.Option(help="Common words.", rich_help_panel="A")] = 0
    early: Annotated[int, typer.Option(help="Common words.", rich_help_panel="B")] = 0


@dataclass
class Far:
    """The rest of both panels."""

    second: Annotated[int, typer.Option(rich_help_panel="A")] = 0
    late: Annotated[int, typer.Option(rich_help_panel="B")] = 0


def verb(
    model: str, near: Near, far: Far, late_too: Annotated[int, typer.Option(rich_help_panel="B")] = 0, out: str = "."
) -> tuple:
    """What a verb got."""
    return model, near, far, late_too, out


def test_panels_are_complete_and_stand_where_their_last_option_stood() -> None:
    made = with_flags(verb)
    assert list(inspect.signature(made).parameters) == ["model", "out", "first", "second", "late_too", "early", "late"]
    given = {"model": "m", "out": "o", "first": 1, "early": 2, "second": 3, "late": 4, "late_too": 5}
    assert made(**given) == ("m", Near(1, 2), Far(3, 4), 5, "o")


def test_a_verb_says_in_its_own_words_what_a_common_option_does() -> None:
    def helps(function) -> dict[str, str | None]:
        parameters = inspect.signature(function).parameters
        return {name: parameters[name].annotation.__metadata__[0].help for name in ("first", "early")}

    assert helps(with_flags(verb, early="Own words.")) == {"first": "Common words.", "early": "Own words."}
    assert helps(with_flags(verb)) == {"first": "Common words.", "early": "Common words."}
    with pytest.raises(TypeError, match="no group with the option missing"):
        with_flags(verb, missing="Own words.")


@pytest.mark.parametrize("name", ["trace", "prune", "sweep", "evaluate"])
def test_help_begins_with_the_examples_and_ends_with_the_machine(call, name, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = call(name, "--help-all")[1]
    panels = [line.split()[1] for line in out.splitlines() if line.startswith(("╭", "+"))]
    assert panels[:3] == ["Arguments", "Options", "Task"]
    assert panels[-1] == "Running"
