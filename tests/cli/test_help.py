"""Help in two lengths, shell completion, and what both say of every option."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import typer

from shape_moe.calibration.presets import presets
from shape_moe.cli.main import COMPLETION, VERBS, command, run

LONG = ("prune", "sweep", "evaluate", "trace", "select", "score")
"""The verbs whose options do not fit one screen."""


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def options_of(verb: str) -> list[str]:
    """The long names of every option of a verb, as Typer parses them."""
    parsed = typer.main.get_command(command(verb)).commands[verb]
    return [name for param in parsed.params for name in (*param.opts, *param.secondary_opts) if name.startswith("--")]


def shown(out: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", "\n".join(line[:60] for line in out.splitlines())))


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_one_screen(call, verb) -> None:
    code, out, _ = call(*([verb] if verb else []), "--help")
    assert code == 0
    lines = out.rstrip().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert "…" not in out


@pytest.mark.parametrize("verb", VERBS)
def test_the_whole_help_has_every_option_and_cuts_nothing(call, verb) -> None:
    code, out, _ = call(verb, "--help-all")
    assert code == 0
    known = options_of(verb)
    assert len(known) >= 3
    assert set(known) - shown(out) <= {"--help-all"}
    assert "…" not in out
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    assert "Show this message and exit." in words
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("verb", LONG)
def test_the_short_help_leads_to_the_whole_one(call, verb) -> None:
    short, whole = call(verb, "--help")[1], call(verb, "--help-all")[1]
    assert shown(short) < shown(whole) | {"--help-all"}
    count = len(typer.main.get_command(command(verb)).commands[verb].params) - 1
    assert f"--help-all Show all {count} arguments and options." in " ".join(short.split())
    for name in ("--json", "--force", "--help"):
        assert name in shown(short)


def test_the_short_help_of_prune_has_the_three_ways_to_say_how_much(call) -> None:
    out = call("prune", "--help")[1]
    assert {"--keep", "--fit", "--max-drop", "--data", "--output", "--target", "--require"} <= shown(out)


def test_an_option_that_does_not_exist_cannot_be_in_the_short_help(monkeypatch) -> None:
    monkeypatch.setattr("shape_moe.cli.prune.FIRST", {"gone": ""})
    with pytest.raises(TypeError, match="prune has no option gone"):
        run(["prune", "--help"])


def test_help_names_values_and_not_python_types(call) -> None:
    for verb in VERBS:
        assert not re.findall(r"<[a-z\[\]]+>", call(verb, "--help-all")[1]), verb


def completions(line: str, monkeypatch, capsys) -> list[str]:
    """What the shell offers behind a line."""
    words = line.split(" ")
    monkeypatch.setenv(COMPLETION, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit):
        run([])
    return capsys.readouterr().out.split()


def test_the_shell_completes_verbs_and_options(monkeypatch, capsys) -> None:
    assert completions("shape-moe pr", monkeypatch, capsys) == ["prune", "presets"]
    assert completions("shape-moe prune --max-dr", monkeypatch, capsys) == ["--max-drop"]
    assert set(completions("shape-moe sweep --max-", monkeypatch, capsys)) >= {"--max-length", "--max-kl", "--max-drop"}


def test_the_overview_and_completion_import_little(monkeypatch) -> None:
    """Both must answer at once: what takes time to import (numpy, polars, datasets, torch ...) is not needed."""
    code = "import sys\nfrom shape_moe.cli.main import run\ntry:\n run(sys.argv[1:])\nexcept SystemExit:\n pass\n"
    code += "print('imported:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    for arguments, line in ((["--help"], None), (["--version"], None), ([], "shape-moe pr")):
        if line is not None:
            for name, value in ((COMPLETION, "complete_bash"), ("COMP_WORDS", line), ("COMP_CWORD", "1")):
                monkeypatch.setenv(name, value)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        names = set(done.stdout.splitlines()[-1].split()[1:])
        assert "typer" in names
        assert names & {"torch", "transformers", "numpy", "polars", "pyarrow", "datasets", "huggingface_hub"} == set()


def test_presets_are_listed(call) -> None:
    code, out, _ = call("presets")
    assert code == 0
    for name, preset in presets().items():
        assert re.search(rf"^{name} .*{re.escape(preset.title)}.*{re.escape(preset.dataset)}", out, re.MULTILINE)
    assert json.loads(call("presets", "--json")[1])["gsm8k"]["dataset"] == presets()["gsm8k"].dataset
