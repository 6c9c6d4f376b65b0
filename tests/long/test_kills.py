"""Jobs that are killed at moments spread over their whole time: what stands verifies, and the rerun ends well."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shape_moe.jobs.verify import verify
from support.selections import seven_of_eight

pytestmark = pytest.mark.long
KILLS = 40


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "shape_moe", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def assert_whole(out: Path) -> None:
    """What stands under the final name is a complete result."""
    if out.exists():
        failed = [check for check in verify(out, device="cpu") if check.passed is False]
        assert failed == []


def test_a_prune_that_is_killed_again_and_again(tmp_path, embedded) -> None:
    seven_of_eight().save(tmp_path / "selection.json")
    arguments = ["prune", embedded, "--selection", tmp_path / "selection.json", "--device", "cpu", "-o"]
    began = time.monotonic()
    undisturbed = start(*arguments, tmp_path / "undisturbed")
    _, said = undisturbed.communicate()
    assert undisturbed.returncode == 0, said.decode()
    whole = time.monotonic() - began
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = 0
    for kill in range(KILLS):
        job = start(*arguments, folder / "out")
        try:
            job.wait((kill + 1) / KILLS * whole)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGKILL)
            job.wait()
            killed += 1
        assert_whole(folder / "out")
        if (folder / "out").exists():
            break
    assert killed >= KILLS / 4
    last = start(*arguments, folder / "out", "--force")
    _, said = last.communicate()
    assert last.returncode == 0, said.decode()
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert_whole(folder / "out")
    weights = sorted(path.name for path in (tmp_path / "undisturbed").glob("*.safetensors"))
    for name in weights:
        assert (folder / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
