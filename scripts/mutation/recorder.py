"""A pytest plugin for the runs that :mod:`mutation.suite` starts.

Variables of the environment say what it does:

- ``MUTANTS_RECORD``, a folder: every test's seconds and whether it passed go to ``tests.jsonl``, and the modules that
  are loaded at the end to ``modules-*.json``.
- ``MUTANTS_PLAN``, a JSON file with ``seconds`` by test, tests that run ``only`` or are left ``without``, and a folder
  ``new_under`` whose tests run too where they have no seconds yet: files of it first,
  each test with a time limit.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

_seconds: dict[str, float] = defaultdict(float)
_failed: set[str] = set()
_UNKNOWN = 5.0


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up set-up, call and teardown; a worker of xdist leaves it to its controller."""
    target = os.environ.get("MUTANTS_RECORD")
    if target is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    _seconds[report.nodeid] += report.duration
    if report.failed:
        _failed.add(report.nodeid)
    if report.when == "teardown":
        line = json.dumps([report.nodeid, round(_seconds[report.nodeid], 4), report.nodeid not in _failed])
        with Path(target, "tests.jsonl").open("a") as stream:
            stream.write(line + "\n")


def pytest_sessionfinish() -> None:
    """Say what was imported, so that a server can import it once for many runs."""
    target = os.environ.get("MUTANTS_RECORD")
    if target is not None:
        Path(target, f"modules-{os.getpid()}.json").write_text(json.dumps(list(sys.modules)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests first: most mutants are caught within a second."""
    source = os.environ.get("MUTANTS_PLAN")
    if source is None:
        return
    plan = json.loads(Path(source).read_text())
    seconds, without, only = plan["seconds"], set(plan["without"]), plan.get("only")
    new_under = plan.get("new_under")

    def wanted(test: str) -> bool:
        if test in without or only is None:
            return test not in without
        return test in covering or bool(new_under and test.startswith(new_under) and test not in seconds)

    covering = set(only or ())
    chosen = [item for item in items if wanted(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item.nodeid)])
    for item in chosen:
        limit = pytest.mark.timeout(90 + 10 * seconds.get(item.nodeid, _UNKNOWN))
        item.add_marker(limit, append=False)
    items[:] = _by_file(chosen, seconds, new_under or "tests/")


def _by_file(items: list[pytest.Item], seconds: dict[str, float], own: str) -> list[pytest.Item]:
    """Whole files, so that what their tests share is made once: those of the package first, then the quickest."""
    by_file: dict[str, float] = defaultdict(float)
    for item in items:
        by_file[item.nodeid.split("::")[0]] += seconds.get(item.nodeid, _UNKNOWN)

    def place(item: pytest.Item) -> tuple[bool, float, str]:
        file = item.nodeid.split("::")[0]
        return not file.startswith(own), by_file[file], file

    return sorted(items, key=place)
