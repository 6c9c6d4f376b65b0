"""The tests: which of them cover a line, and runs of them in copies of the tree."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutation.operators import Mutant

_LEFT_OUT = ("tests/engines",)
"""They need a vLLM; ``make test`` skips them too."""
_FIRST_SECONDS = 60.0
_MOST_FAILING = 5
_OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def copy_tree(project: Path, target: Path) -> Path:
    """Copy what git knows and does not ignore; an older copy is replaced."""
    shutil.rmtree(target, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        source = project / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def _environment(tree: Path) -> dict[str, str]:
    tools = Path(__file__).parents[1]
    return {**os.environ, **_OFFLINE, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tools)])}


def _arguments() -> list[str]:
    ignored = [f"--ignore={folder}" for folder in _LEFT_OUT]
    return ["-q", "-p", "mutation.recorder", "-p", "no:randomly", "-p", "no:cacheprovider", *ignored]


@dataclass(frozen=True)
class Cover:
    """Which tests run which lines, how long they take, and what they import.

    Attributes:
        lines: tests by file and line.
        digests: of the files as they were then; in a file that has changed, lines are not told apart.
        seconds: by test.
        modules: names of everything that was imported.
        failing: tests that fail without any fault; they can catch none and are left out.
    """

    lines: dict[str, dict[int, list[str]]]
    digests: dict[str, str]
    seconds: dict[str, float]
    modules: list[str]
    failing: list[str]

    def of(self, mutant: Mutant) -> list[str]:
        """Tests that run the mutant's statement.

        Those that run any line of its file for what an import runs, and where the file has changed since; those of its
        package where there are none.
        """
        lines = self.lines.get(mutant.file, {})
        same = self.digests.get(mutant.file) == digest(mutant.before)
        first, last = mutant.statement if mutant.statement and same else (1, max(lines, default=1))
        tests = {test for line in range(first, last + 1) for test in lines.get(line, ())}
        if not tests:
            tests = {test for test in self.seconds if test.startswith(tests_of(mutant.file))}
        tests -= set(self.failing)
        return sorted(tests, key=lambda test: (self.seconds.get(test, 0.0), test))


def digest(text: str) -> str:
    """A short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tests_of(file: str) -> str:
    """Where the tests of a file's package are."""
    return f"tests/{Path(file).parent.name}/"


def record(tree: Path, folder: Path, tests: Sequence[str], workers: int) -> Cover:
    """Run tests once with coverage, and keep the result in a folder.

    Raises:
        SystemExit: when the suite fails without any mutant.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = folder / "settings.ini"
    settings.write_text(f"[run]\nsource = {tree / 'src'}\nrelative_files = true\ndata_file = {folder / 'coverage'}\n")
    measured = ["--cov", f"--cov-config={settings}", "--cov-context=test", "--cov-report=", *tests]
    command = [sys.executable, "-m", "pytest", *_arguments(), "-n", str(workers), *measured]
    digests = {path.relative_to(tree).as_posix(): digest(path.read_text()) for path in (tree / "src").rglob("*.py")}
    (folder / "digests.json").write_text(json.dumps(digests))
    environment = {**_environment(tree), "MUTANTS_RECORD": str(folder)}
    done = subprocess.run(command, cwd=tree, env=environment, check=False)
    cover = read_cover(tree, folder) if done.returncode in {0, 1} else None
    if cover is None or len(cover.failing) > _MOST_FAILING:
        sys.exit("Tests fail without any fault; mend them first.")
    return cover


def read_cover(tree: Path, folder: Path) -> Cover:
    """What :func:`record` kept."""
    from coverage import CoverageData

    data = CoverageData(str(folder / "coverage"))
    data.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for file in data.measured_files():
        name = os.path.relpath(tree / file, tree)
        contexts = data.contexts_by_lineno(file)
        lines[name] = {
            line: sorted({context.rsplit("|", 1)[0] for context in found if context})
            for line, found in contexts.items()
        }
    tests = [json.loads(line) for line in (folder / "tests.jsonl").read_text().splitlines()]
    modules: dict[str, None] = {}
    for file in sorted(folder.glob("modules-*.json")):
        modules |= dict.fromkeys(json.loads(file.read_text()))
    return Cover(
        lines,
        json.loads((folder / "digests.json").read_text()),
        seconds={test: seconds for test, seconds, _ in tests},
        modules=list(modules),
        failing=[test for test, _, passed in tests if not passed],
    )


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        caught: a test failed, or the run took too long.
        by: the test, or what happened.
        seconds: how long it took.
    """

    caught: bool
    by: str
    seconds: float


class Room:
    """A copy of the tree with a server that runs tests in it.

    Args:
        project: the checkout; it is only read.
        folder: for the copy and everything the runs write.
        cover: of this tree.
        quick: run the quickest tests that cover a mutant only, not the rest of the suite.
    """

    def __init__(self, project: Path, folder: Path, cover: Cover, *, quick: bool = False) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.tree, self.folder, self.cover = copy_tree(project, folder / "tree"), folder, cover
        self._trusted: set[str] = set()
        self._quick = quick
        (folder / "modules.json").write_text(json.dumps(cover.modules))
        self._server = subprocess.Popen(
            [sys.executable, "-m", "mutation.server", str(folder / "modules.json")],
            cwd=self.tree,
            env=_environment(self.tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def judge(self, mutant: Mutant) -> Outcome:
        """Run the tests that cover a mutant, and the rest of the suite where they let it live.

        A test that catches one is run without the fault as well, once: if it fails then too, it is left out.
        """
        seconds = 0.0
        while True:
            outcome = self._tried(mutant)
            seconds += outcome.seconds
            if not outcome.caught or "::" not in outcome.by or self._trusts(outcome.by):
                return Outcome(outcome.caught, outcome.by, round(seconds, 2))
            self.cover.failing.append(outcome.by)

    def _tried(self, mutant: Mutant) -> Outcome:
        first_ones = self._first(self.cover.of(mutant), tests_of(mutant.file))
        file = self.tree / mutant.file
        file.write_text(mutant.after)
        try:
            first = self._run(only=first_ones, new_under=tests_of(mutant.file))
            if first.caught or self._quick:
                return first
            rest = self._run(without=first_ones)  # new ones once more
            return Outcome(rest.caught, rest.by, first.seconds + rest.seconds)
        finally:
            file.write_text(mutant.before)

    def _first(self, covering: Sequence[str], own: str) -> list[str]:
        """Covering tests for about a minute; the others come with the rest of the suite.

        Files of the mutant's own package come first, then the quickest. The slowest test of a file is counted with any
        of its tests, since it may be the one that made what they share.
        """
        known, by_file = self.cover.seconds, defaultdict[str, list[str]](list)
        for test in covering:
            by_file[test.split("::")[0]].append(test)
        slowest = defaultdict[str, float](float)
        for test, seconds in known.items():
            file = test.split("::")[0]
            slowest[file] = max(slowest[file], seconds)
        cost = {file: slowest[file] + sum(known.get(test, 1.0) for test in tests) for file, tests in by_file.items()}
        spent, chosen = 0.0, []
        for file in sorted(by_file, key=lambda file: (not file.startswith(own), cost[file], file)):
            spent += slowest[file]
            for test in by_file[file]:
                spent += known.get(test, 1.0)
                if chosen and spent > _FIRST_SECONDS:
                    return chosen
                chosen.append(test)
        return chosen

    def _trusts(self, test: str) -> bool:
        if test not in self._trusted and self._run(only=[test]).caught:
            return False
        self._trusted.add(test)
        return True

    def _run(
        self, only: Collection[str] | None = None, without: Collection[str] = (), new_under: str | None = None
    ) -> Outcome:
        seconds = self.cover.seconds
        plan: dict[str, Any] = {"seconds": seconds, "without": [*without, *self.cover.failing]}
        files = ["tests"]
        if only is not None:
            plan |= {"only": list(only), "new_under": new_under}
            files = sorted({test.split("::")[0] for test in only} | ({new_under} if new_under else set()))
            files = [name for name in files if (self.tree / name).exists()]
        (self.folder / "plan.json").write_text(json.dumps(plan))
        log = self.folder / "log.txt"
        expected = sum(seconds.get(test, 5.0) for test in (seconds if only is None else only))
        request = {
            "arguments": [*_arguments(), "-x", f"--basetemp={self.folder / 'temporary'}", *files],
            "environment": {"MUTANTS_PLAN": str(self.folder / "plan.json")},
            "log": str(log),
            "limit": 120 + 3 * expected,
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._answer()
        code, text = answer["code"], log.read_text(errors="replace")
        if code is None:
            return Outcome(True, "took too long", answer["seconds"])
        if code in {0, 5}:  # 5: no test was left to run
            return Outcome(False, "", answer["seconds"])
        found = re.search(r"^(?:FAILED|ERROR) (\S+.*)$", text, re.MULTILINE)
        by = found[1].split(" - ")[0] if found else f"pytest ended with {code}"
        return Outcome(True, by, answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the test server ended")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
