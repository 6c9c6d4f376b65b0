"""What the command imports, shows and says before any work begins."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import shape_moe
from shape_moe.cli import main
from shape_moe.cli.main import VERBS, run

HEAVY = ("torch", "transformers")
LIST_HEAVY = f"""
import sys
from shape_moe.cli.main import run
code = run(sys.argv[1:])
print("imported:", *[name for name in {HEAVY} if name in sys.modules], "code:", code)
"""


def imported(*arguments: str, before: str = "") -> str:
    """What a fresh interpreter has imported of the heavy packages once the command is done, and its exit code."""
    command = [sys.executable, "-c", before + LIST_HEAVY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_needs_neither_torch_nor_transformers(arguments) -> None:
    assert imported(*arguments) == "imported: code: 0"


def test_inspect_needs_neither_torch_nor_transformers(embedded) -> None:
    assert imported("inspect", str(embedded), "--fit", "24GiB") == "imported: code: 0"


def test_the_list_of_imports_would_show_them() -> None:
    assert imported("--version", before="import torch, transformers") == "imported: torch transformers code: 0"


def test_the_overview_names_every_verb(call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    for verb, summary in VERBS.items():
        assert f"{verb} {summary}" in text


def test_only_the_verb_that_is_run_is_imported() -> None:
    listed = (
        "import sys, shape_moe.cli.main as m; m.run(['--help']); "
        "print([v for v in m.VERBS if f'shape_moe.cli.{v}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ((), "Interrupted."),
        (("Kept in a.partial.",), "Interrupted. Kept in a.partial."),
        (("Kept in a.partial/trace.partial.", "Kept in a.partial."), "Interrupted. Kept in a.partial."),
    ],
)
def test_an_interrupt_says_what_was_kept_and_nothing_else(monkeypatch, capsys, notes, said) -> None:
    def interrupted(*_: object, **__: object) -> None:
        interrupt = KeyboardInterrupt()
        for note in notes:
            interrupt.add_note(note)
        raise interrupt

    monkeypatch.setattr("shape_moe.cli.inspect.inspect_model", interrupted)
    assert run(["inspect", "somewhere"]) == 130
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (["inspect", "M"], "shape_moe.cli.inspect.inspect_model"),
        (["trace", "M", "--data", "D", "-o", "O"], "shape_moe.jobs.trace.trace"),
        (["convert", "F", "-o", "O"], "shape_moe.jobs.convert.convert"),
        (["merge", "T", "-o", "O"], "shape_moe.jobs.trace.merge"),
        (["score", "T"], "shape_moe.jobs.select.opened"),
        (["select", "T", "--keep", "60%"], "shape_moe.jobs.select.opened"),
        (["sweep", "M", "--data", "D"], "shape_moe.jobs.sweep.sweep"),
        (["prune", "M", "--data", "D", "--keep", "60%", "-o", "O"], "shape_moe.jobs.prune.prune"),
        (["serve", "M", "--selection", "S"], "shape_moe.cli.serve._vllm_command"),
        (["verify", "D"], "shape_moe.jobs.verify.verify"),
        (["evaluate", "M", "--data", "D"], "shape_moe.jobs.evaluate.evaluate"),
        (["measure", "M", "--trace", "T", "--data", "D", "-o", "O"], "shape_moe.jobs.measure.measure"),
        (["presets"], "shape_moe.calibration.presets.presets"),
        (["experiment", "C"], "shape_moe.cli.experiment.read_config"),
        (["report", "D"], "shape_moe.jobs.report.report"),
        (["demo"], "shape_moe.demo.run.run_demo"),
        (["families"], "shape_moe.cli.families.known"),
        (["doctor"], "shape_moe.demo.doctor.diagnose"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_every_verb_ends_with_130_and_claims_nothing(arguments, work, monkeypatch, capsys, tmp_path) -> None:
    """Nothing was done yet, so nothing is said to be kept, and nothing is left."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    place, name = work.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(place), name, interrupted)
    if place.startswith("shape_moe.jobs."):
        monkeypatch.setitem(vars(shape_moe), name, interrupted)
    assert run(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted."
    assert list(tmp_path.iterdir()) == []


def test_every_verb_is_in_that_list() -> None:
    mark = next(m for m in test_every_verb_ends_with_130_and_claims_nothing.pytestmark if m.name == "parametrize")
    assert {arguments[0] for arguments, _ in mark.args[1]} == set(VERBS)


def test_an_interrupt_while_the_command_still_starts(monkeypatch, capsys) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "command", interrupted)
    assert run(["inspect"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
