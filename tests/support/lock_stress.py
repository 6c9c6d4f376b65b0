"""Processes that all want one output: ``python lock_stress.py OUT SECONDS`` prints what one of them met, as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from shape_moe.errors import ShapeMoeError
from shape_moe.workspace import Workspace, write_text


def stress(out: Path, processes: int, seconds: float) -> Counter[str]:
    """Let processes replace one output again and again; what they met, added up."""
    command = [sys.executable, __file__, str(out), str(seconds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    met: Counter[str] = Counter()
    for process in running:
        printed, _ = process.communicate(timeout=seconds + 60)
        met.update(json.loads(printed))
    return met


def _enter(out: Path, marker: Path, met: Counter[str]) -> None:
    with Workspace(out, {"verb": "stress"}, force=True) as work:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            met["inside"] += 1
            return
        try:
            write_text(work.path / "trace.json", str(os.getpid()))
            assert (work.path / "trace.json").read_text() == str(os.getpid())
            work.complete()
            met["entries"] += 1
        finally:
            marker.unlink()


def _main(out: Path, seconds: float) -> None:
    met: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            _enter(out, out.with_name("marker"), met)
        except ShapeMoeError:
            met["refused"] += 1
        except Exception as error:  # noqa: BLE001  # whatever it is, it is counted
            met[type(error).__name__] += 1
    print(json.dumps(met))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), float(sys.argv[2]))
