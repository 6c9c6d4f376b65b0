"""Would the tests notice? Small faults are put into the code, one at a time, and the tests are run.

    python scripts/mutants.py                      # 150 mutants of the default packages
    python scripts/mutants.py --paths src/shape_moe/evaluation --count 40 --seed 7
    python scripts/mutants.py --patches faults/    # faults written by hand, one patch file each

The suite runs once with coverage, so that each mutant meets the tests that run its lines first, and the rest of the
suite only if they let it live. Mutants live in copies of the tree (under ``build/mutants``); the checkout is only
read. A run that is stopped goes on where it was: whatever was caught stays caught as long as its file does not change,
and survivors are tried again. Survivors that no test could notice stand in ``scripts/mutation/equivalent.json`` with
the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from mutation.operators import Mutant, mutants_of, sample
from mutation.patches import read_patches
from mutation.suite import Cover, Outcome, Room, copy_tree, read_cover, record

PROJECT = Path(__file__).resolve().parents[1]
DEFAULT = ["src/shape_moe/scoring", "src/shape_moe/selection", "src/shape_moe/pruning", "src/shape_moe/tracing"]
LEFT_OUT = ("vllm_engine.py", "vllm_worker.py", "__init__.py")
"""What needs a running vLLM is tested by ``make test-vllm``."""
EQUIVALENT = Path(__file__).parent / "mutation" / "equivalent.json"
MOST_EQUIVALENT, LEAST_CAUGHT = 0.10, 0.90


def sources(paths: list[str]) -> list[Path]:
    """Python files of folders, or files themselves."""
    found = []
    for name in paths:
        path = PROJECT / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [path for path in found if path.name not in LEFT_OUT]


def chosen(options: argparse.Namespace) -> list[Mutant]:
    """The mutants of this run."""
    if options.patches:
        return read_patches(PROJECT, Path(options.patches))
    every = (
        mutant
        for path in sources(options.paths)
        for mutant in mutants_of(path.relative_to(PROJECT).as_posix(), path.read_text())
    )
    return sample(every, options.count, options.seed)


def digest_of(folder: Path, names: list[str]) -> str:
    """One hash over files."""
    found = hashlib.sha256()
    for name in names:
        for path in sorted((folder / name).rglob("*.py")):
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def cover_of(work: Path, tests: list[str], workers: int, again: bool) -> Cover:
    """Coverage of this tree, or as it was recorded before."""
    folder, tree = work / "cover", work / "tree"
    if not again and (folder / "tests.jsonl").is_file():
        return read_cover(tree, folder)
    print("Running the tests once with coverage ...", file=sys.stderr)
    return record(copy_tree(PROJECT, tree), folder, tests, workers)


class Journal:
    """Outcomes so far, one JSON line each."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, threading.Lock()
        self.known: dict[str, dict[str, Any]] = {}
        if file.is_file():
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                self.known[entry["key"]] = entry

    def caught(self, mutant: Mutant) -> Outcome | None:
        """How the same mutant of the same file was caught before."""
        entry = self.known.get(mutant.key)
        if entry is None or not entry["caught"] or entry["source"] != _digest(mutant):
            return None
        return Outcome(True, entry["by"], entry["seconds"])

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        """Keep an outcome."""
        entry = {"key": mutant.key, "source": _digest(mutant), **vars(outcome)}
        with self.lock, self.file.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


def _digest(mutant: Mutant) -> str:
    return hashlib.sha256(mutant.after.encode()).hexdigest()[:16]


def judge_all(mutants: list[Mutant], cover: Cover, options: argparse.Namespace) -> dict[str, Outcome]:
    """Outcomes by key; every worker has a room of its own."""
    work, workers = options.work, options.workers
    journal = Journal(work / "journal.jsonl")
    outcomes: dict[str, Outcome] = {}
    waiting: queue.Queue[Mutant] = queue.Queue()
    for mutant in mutants:
        known = journal.caught(mutant)
        if known is None:
            waiting.put(mutant)
        else:
            outcomes[mutant.key] = known

    def work_off(number: int) -> None:
        room = Room(PROJECT, work / f"room-{number}", cover, quick=options.quick)
        while True:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return room.close()
            outcome = room.judge(mutant)
            journal.add(mutant, outcome)
            outcomes[mutant.key] = outcome
            word = f"caught by {outcome.by}" if outcome.caught else f"SURVIVED\n{mutant.diff}"
            print(f"[{len(outcomes)}/{len(mutants)}] {outcome.seconds:6.1f} s  {mutant.file}:{mutant.line} "
                  f"{mutant.kind}: {word}", file=sys.stderr, flush=True)  # fmt: skip

    threads = [threading.Thread(target=work_off, args=(number,)) for number in range(min(workers, waiting.qsize()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(outcomes) < len({mutant.key for mutant in mutants}):
        sys.exit("Not every mutant was tried; run the command again.")
    return outcomes


def document(
    mutants: list[Mutant], outcomes: dict[str, Outcome], options: argparse.Namespace, cover: Cover, seconds: float
) -> dict[str, Any]:
    """The result, with the diff of every survivor."""
    reasons = {(e["file"], e["change"]): e["reason"] for e in json.loads(EQUIVALENT.read_text())}
    entries: list[dict[str, Any]] = []
    for mutant in mutants:
        outcome = outcomes[mutant.key]
        entry: dict[str, Any] = {"file": mutant.file, "line": mutant.line, "kind": mutant.kind}
        if outcome.caught:
            entry |= {"outcome": "caught", "by": outcome.by, "seconds": outcome.seconds}
        else:
            equal = reasons.get((mutant.file, mutant.change))
            entry |= {"outcome": "missed" if equal is None else "equivalent", "seconds": outcome.seconds}
            entry |= {"diff": mutant.diff, "reason": equal or "missed: no test notices"}
        entries.append(entry)
    counts = Counter(entry["outcome"] for entry in entries)
    judged = len(entries) - counts["equivalent"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=False)
    return {
        "command": "scripts/mutants.py " + " ".join(sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "source": digest_of(PROJECT, ["src"]),
        "tests": digest_of(PROJECT, ["tests"]),
        "python": platform.python_version(),
        "seed": options.seed,
        "sample": len(entries),
        "caught": counts["caught"],
        "equivalent": counts["equivalent"],
        "missed": counts["missed"],
        "caught_share": round(counts["caught"] / judged, 4) if judged else 1.0,
        "equivalent_share": round(counts["equivalent"] / len(entries), 4),
        "seconds": round(seconds),
        "failing_without_a_fault": cover.failing,
        "mutants": sorted(entries, key=lambda entry: (entry["file"], entry["line"], entry["kind"])),
    }


def main() -> int:
    """Try mutants; the exit code says whether the tests are good enough."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--paths", nargs="+", default=DEFAULT, help="files or folders to put faults into")
    parser.add_argument("--count", type=int, default=150, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--patches", help="a folder of patch files, each one fault, instead of a sample")
    parser.add_argument("--workers", type=int, default=2, help="mutants that are tried at a time")
    parser.add_argument("--first", nargs="+", default=["tests"], help="tests to look for covering ones among")
    parser.add_argument("--again", action="store_true", help="record coverage anew, after large changes")
    parser.add_argument(
        "--work", type=Path, default=PROJECT / "build" / "mutants", help="folder for copies and journal"
    )
    parser.add_argument("--quick", action="store_true", help="do not run the rest of the suite on survivors")
    parser.add_argument("--out", type=Path, help="file for the result")
    options = parser.parse_args()
    started = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    mutants = chosen(options)
    cover = cover_of(options.work, options.first, options.workers, options.again)
    outcomes = judge_all(mutants, cover, options)
    result = document(mutants, outcomes, options, cover, time.monotonic() - started)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['sample']} mutants: {result['caught']} caught, {result['missed']} missed, "
        f"{result['equivalent']} equivalent; {result['caught_share']:.1%} of those that could be caught were."
    )
    good = result["caught_share"] >= LEAST_CAUGHT and result["equivalent_share"] <= MOST_EQUIVALENT
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
