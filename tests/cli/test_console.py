"""The terminal, which acts on control characters: none of a file's name or a library's message reaches it."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from rich.text import Text

from shape_moe.cli.console import Output, new_console, plain_table

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
