"""The doctor: what it tries, what it says of failures, and that it names no place."""

from __future__ import annotations

import json
import os
import platform

import pytest

from shape_moe.cli.main import run
from shape_moe.demo import doctor
from shape_moe.demo.doctor import diagnose, without_places


def test_everything_works_here(capfd) -> None:
    assert run(["doctor", "--device", "cpu", "--no-imports", "--json", "-q"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [(entry["name"], entry["passed"]) for entry in told["findings"][:5]] == [
        ("trace", True),
        ("stream", True),
        ("masks", True),
        ("prune and reload", True),
        ("verify", True),
    ]
    assert told["findings"][1]["detail"] == "equal to the trace of the whole model"
    assert told["findings"][3]["detail"].startswith("77 of 128 experts, KL ")
    assert told["passed"] is True
    assert told["device"] == "cpu"
    assert told["versions"]["torch"][0].isdigit()


def test_a_failure_is_shown_without_places_and_ends_with_code_1(monkeypatch, tmp_path, capfd) -> None:
    def fails(case) -> str:
        raise OSError(f"cannot read '{case.folder}/trace/secret.bin' nor {tmp_path}")

    monkeypatch.setattr(doctor, "_checks", lambda: {"trace": lambda _: "fine", "stream": fails, "masks": lambda _: "3"})
    monkeypatch.setattr(doctor, "LIBRARIES", {"json": ("no-such",), "no_such_library": ("none",)})
    assert run(["doctor", "--device", "cpu"]) == 1
    said, notes = capfd.readouterr()
    lines = said.splitlines()
    assert "json: version unknown, can be imported" in lines
    assert "no_such_library: not installed" in lines
    ends = [line.split("s): ")[1] for line in lines if line.startswith(("  ok", "  FAIL"))]
    assert ends == ["fine", f"OSError: cannot read '.../secret.bin' nor .../{tmp_path.name}", "3"]
    assert [line.split()[0] for line in lines if line.startswith(("  ok", "  FAIL"))] == ["ok", "FAIL", "ok"]
    assert "Something failed" in notes
    assert str(tmp_path.parent) not in said
    assert platform.node() not in said


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("No such file: '/home/jane/models/q/config.json'", "No such file: '.../config.json'"),
        (r"C:\Users\Jane\x.gguf is missing", ".../x.gguf is missing"),
        ("either/or 3/4 of it", "either/or 3/4 of it"),
        ("plain", "plain"),
    ],
)
def test_paths_lose_their_folders(text, left) -> None:
    assert without_places(text) == left


def test_the_names_of_machine_and_user_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "janes-desk")
    monkeypatch.setitem(os.environ, "USER", "jane")
    assert without_places("jane at janes-desk, not janet") == "... at ..., not janet"


def test_a_library_that_breaks_is_named_with_its_error(monkeypatch, tmp_path) -> None:
    (tmp_path / "broken_library.py").write_text("raise ImportError('libfoo.so.1: cannot open /opt/x/libfoo.so.1')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "LIBRARIES", {"broken_library": ("broken",)})
    monkeypatch.setattr(doctor, "_checks", dict)
    found = diagnose("cpu")
    expected = "version unknown, cannot be imported: ImportError: libfoo.so.1: cannot open .../libfoo.so.1"
    assert found.libraries == {"broken_library": expected}
    assert found.passed
    assert not diagnose("cpu", imports=False).libraries["broken_library"].count("import")
