"""Runs pytest many times in one tree: libraries are imported once, every run is a fork.

Started as ``python -m mutation.server MODULES.json`` with the tree as working folder. A line of stdin is one run:
``{"arguments": [...], "environment": {...}, "log": FILE, "limit": SECONDS}``, where the limit is one of processor time,
so that a busy machine stops no run (ten times as long by the clock, for what waits forever). The answer is a line with
``code``, pytest's exit code or null for a run that was stopped, and ``seconds``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

_OWN = ("shape_moe", "support", "tests", "mutation", "benchmarks", "scripts", "__main__", "__mp_main__", "conftest")


def preload(modules: list[str]) -> None:
    """Import what a whole run imported, but for the project's own modules and the tests."""
    for name in modules:
        parts = name.split(".")
        if parts[0] in _OWN or "test" in parts[0] or any(part.startswith("test_") for part in parts):
            continue
        with suppress(BaseException), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """One run of pytest in a fork."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for target, stream in ((0, nothing), (1, log), (2, log)):
                os.dup2(stream, target)
            os.environ.update(request["environment"])
            code = int(pytest.main(request["arguments"]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = _wait(child, request["limit"])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests started and left
    return {"code": code, "seconds": round(time.monotonic() - started, 2)}


def _wait(child: int, limit: float) -> int | None:
    deadline, process = time.monotonic() + 10 * limit, psutil.Process(child)
    while time.monotonic() < deadline and sum(process.cpu_times()[:4]) < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload(json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
