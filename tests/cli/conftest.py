"""The command, called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shape_moe.cli.main import run


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command with some arguments: its exit code, stdout and stderr."""

    def invoke(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke
