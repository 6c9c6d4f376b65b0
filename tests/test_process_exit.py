"""A finished job ends with its own exit code, whatever native libraries do on the way out."""

from __future__ import annotations

import subprocess
import sys

import pytest

ABORTS = (
    "import atexit, ctypes, sys, types\n"
    "libc = ctypes.CDLL(None)\n"
    "libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)\n"
    "atexit.register(lambda: print('registered'))\n"
    "print('done', end=' ')\n"
)
LEAVE = "from shape_moe.process_exit import leave\nleave({code})\n"
ENGINE = "sys.modules['vllm'] = types.ModuleType('vllm')\n"


def run(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_a_destructor_can_abort_a_finished_process() -> None:
    """What the tests below rest on."""
    assert run(ABORTS)[0] == -6


@pytest.mark.parametrize("code", [0, 3])
def test_an_engine_that_aborts_on_the_way_out_does_not_decide_the_exit_code(code) -> None:
    assert run(ABORTS + ENGINE + LEAVE.format(code=code)) == (code, "done registered\n")


def test_without_an_engine_a_process_ends_as_ever() -> None:
    assert run(ABORTS + LEAVE.format(code=0))[0] == -6
    assert run(LEAVE.format(code=2))[0] == 2


def test_the_command_leaves_so() -> None:
    code = (
        "from shape_moe.cli import main\n"
        "main.run = lambda arguments: 7\n"
        "main.main(['inspect'])\n"
    )  # fmt: skip
    assert run(ABORTS + ENGINE + code)[0] == 7
