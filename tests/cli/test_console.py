"""The terminal, which acts on control characters: none of a file's name or a library's message reaches it."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from rich.text import Text

from shape_moe.cli.console import Output, new_console, plain_table, show_commands

HOSTILE = "\x1b[31mred\x07\x9b1m"
SPELLED = r"\x1b[31mred\x9b1m"
"""Rich itself leaves out BEL and its like."""


def test_every_way_to_print_spells_control_characters_out(capsys) -> None:
    console = new_console(file=sys.stdout, width=60)
    table = plain_table("name", title=HOSTILE)
    table.add_row(HOSTILE)
    for content in (HOSTILE, Text(HOSTILE), table):
        console.print(content, markup=False)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert out.count(SPELLED) == 4


def test_styles_of_our_own_still_work(capsys) -> None:
    new_console(file=sys.stdout, force_terminal=True, color_system="standard").print(Text(HOSTILE, "red"))
    assert capsys.readouterr().out == f"\x1b[31m{SPELLED}\x1b[0m\n"


def test_notes_warnings_and_phases(capsys) -> None:
    talk = Output()
    talk.note(HOSTILE)
    talk.warn(HOSTILE)
    with talk.phase(f"[b]{HOSTILE}", 1, "thing"):
        pass
    err = capsys.readouterr().err
    assert err.startswith(f"{SPELLED}\nWarning: {SPELLED}\n[b]{SPELLED}: ")
    assert err.isprintable() is False  # line feeds
    assert all(line.isprintable() for line in err.splitlines())


@pytest.mark.parametrize("arguments", [["inspect", f"./{HOSTILE}"], ["score", HOSTILE], ["--" + HOSTILE], [HOSTILE]])
def test_errors_name_a_hostile_file_harmlessly(call, arguments) -> None:
    code, out, err = call(*arguments)
    assert code in {1, 2}
    assert out == ""
    assert r"\x1b[31mred" in err
    assert all(line.isprintable() for line in err.splitlines())


def test_json_is_pure(call, embedded, tmp_path) -> None:
    link = tmp_path / "\x1b[31m"
    link.symlink_to(embedded)
    code, out, _ = call("inspect", link, "--json")
    assert code == 0
    assert "\x1b" not in out
    assert json.loads(out)["model"] == str(link)


def progress_of(total: int, unit: str, done: int, monkeypatch) -> str:
    """What a terminal shows of a phase in which some steps are done."""
    output = io.StringIO()
    console = new_console(file=output, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(Output, "err", property(lambda _: console))
    with Output().phase("Judging", total, unit) as advance:
        for _ in range(done):
            advance(1)
    return output.getvalue()


def test_one_step_has_no_bar_but_says_how_long_it_takes(monkeypatch) -> None:
    shown = progress_of(1, "model", 0, monkeypatch)
    assert "Judging" in shown
    assert "0 of 1" not in shown
    assert "━" not in shown
    assert "-:--:--" not in shown
    assert "0:00:00" in shown
    several = progress_of(8, "point", 3, monkeypatch)
    assert "3 of 8 points" in several
    assert "━" in several
    assert "-:--:--" not in several


def test_without_a_terminal_one_step_is_one_line_with_its_time(capsys) -> None:
    with Output().phase("Loading", 1, "model") as advance:
        advance(1)
    assert re.fullmatch(r"Loading: \d+\.\d s\n", capsys.readouterr().err)


LONG = "Every word of this sentence is whole, however narrow the terminal may be on which a reader looks at it."


def test_lines_are_folded_between_words_on_a_terminal_and_not_at_all_elsewhere(capsys) -> None:
    new_console(file=sys.stdout, force_terminal=True, width=30, color_system=None).print(LONG)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert " ".join(lines).split() == LONG.split()
    new_console(file=sys.stdout).print(f"{LONG} {LONG}")
    assert capsys.readouterr().out == f"{LONG} {LONG}\n"


def test_commands_are_never_folded(capsys) -> None:
    console = new_console(file=sys.stdout, force_terminal=True, width=30, color_system=None)
    show_commands(console, [LONG])
    assert capsys.readouterr().out == f"  {LONG}\n"


def test_narrow_tables_lose_no_figure(capsys) -> None:
    console = new_console(file=sys.stdout, force_terminal=True, width=80, color_system=None)
    table = plain_table("model", *(f"a long heading {place}" for place in range(6)))
    figures = [f"{place}2.3456 [{place}1.2345, {place}3.4567]" for place in range(1, 7)]
    table.add_row("folder/with/a/long/name-of-a-model", *figures)
    console.print(table)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(len(line) for line in out.splitlines()) <= 80
    for figure in " ".join(figures).split():
        assert figure in out
