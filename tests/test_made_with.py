"""What a result says of the command that made it."""

from __future__ import annotations

import shlex

import pytest

from shape_moe.cli import main
from shape_moe.made_with import command_line, made_with


def test_a_command_can_be_pasted_and_ends_with_its_run() -> None:
    arguments = ["evaluate", "my model", "--data", "it's.jsonl", "--by", "$kind"]
    with pytest.raises(RuntimeError), command_line(arguments):
        assert shlex.split(made_with(0)["command"]) == ["shape-moe", *arguments]
        raise RuntimeError
    assert made_with(0)["command"] == ""


def test_python_records_no_arguments_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--token", "secret"])
    assert made_with(3) == {**made_with(3), "seed": 3, "command": ""}


@pytest.mark.parametrize("given", [True, False])
def test_the_command_line_says_what_runs(monkeypatch, given: bool) -> None:
    arguments, seen = ["select", "my trace", "--keep", "0.6"], []
    monkeypatch.setattr("sys.argv", ["shape-moe", *arguments])

    def verb(name: str) -> object:
        assert name == "select"
        return lambda **_: seen.append(made_with(0)["command"])

    monkeypatch.setattr(main, "command", verb)
    assert main.run(arguments if given else None) == 0
    assert seen == ["shape-moe select 'my trace' --keep 0.6"]
