"""Larger than memory: whole commands on a random checkpoint, against the model in memory and against what others do.

``python -m benchmarks.streaming [GIGABYTES ...] [--cases trace,prune,offload,all-experts] [--limit GIB]``

- ``trace``: ``trace --stream`` against ``trace --no-stream``;
- ``prune``: ``prune --stream`` end to end, traced, written, verified and judged, within the limit (4 GiB);
- ``offload``: the same trace through accelerate's disk offload;
- ``all-experts``: layer by layer with every expert on every token.

Time, largest memory above that of an interpreter with the same imports, and bytes read from disk. The files' pages are
dropped from the cache before each command where the system allows it; where not, the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import write
from benchmarks.streaming_model import (
    EXAMPLES,
    EXPERTS,
    HIDDEN,
    LAYERS_PER_GB,
    LENGTH,
    TOP_K,
    WIDTH,
    make_checkpoint,
    make_data,
)

CASES = ("trace", "prune", "offload", "all-experts")
_BEYOND = 137


def forget(folder: Path) -> bool:
    """Drop the files' pages from the system's cache; gives whether the system can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return True


def child(model: Path, report: Path, limit: int, case: str, *arguments: str | int | Path) -> dict[str, Any]:
    """One piece of work in a process of its own."""
    dropped = forget(model)
    began = time.perf_counter()
    given = [str(report), str(limit), case, *map(str, arguments)]
    code = subprocess.run([sys.executable, "-m", "benchmarks.streaming_child", *given], check=False).returncode
    seconds = time.perf_counter() - began
    if code:
        return {"ended": "went beyond the limit" if code == _BEYOND else f"code {code}", "seconds": seconds}
    found = json.loads(report.read_text())
    above = {
        "above": found["peak"] - found["interpreter"],
        "anonymous_above": found["anonymous_peak"] - found["anonymous_interpreter"],
    }
    return {"seconds": seconds, **found, **above, "page_cache_dropped": dropped}


def trace(model: Path, data: Path, place: Path, layer: int) -> dict[str, Any]:
    """Traces layer by layer and in memory."""
    found = {}
    for flag in ("--stream", "--no-stream"):
        out = place / f"trace{flag}"
        arguments = ("trace", model, "--data", data, "--samples", EXAMPLES, "-o", out, "--device", "cpu", flag)
        found[flag] = child(model, place / "report.json", 0, "command", *arguments)
    files = [place / f"trace{flag}" / "statistics.safetensors" for flag in found]
    streamed, whole = found["--stream"], found["--no-stream"]
    return {
        "streamed": streamed,
        "whole": whole,
        "time_ratio": streamed["seconds"] / whole["seconds"],
        "streamed_peak_above_interpreter_less_two_layers": streamed["above"] - 2 * layer,
        "same_statistics": files[0].read_bytes() == files[1].read_bytes(),
    }


def prune(model: Path, data: Path, place: Path, limit: int) -> dict[str, Any]:
    """The whole job within a limit of anonymous memory, and what it ended with."""
    out = place / "smaller"
    arguments = ("prune", model, "--data", data, "--samples", EXAMPLES, "-o", out, "--device", "cpu", "--stream")
    method = ("--keep", "0.75", "--scorer", "shape", "--rule", "coverage", "--routing", "drop")
    found = child(model, place / "report.json", limit, "command", *arguments, *method)
    judgement = out / "shape" / "judgement.json"
    told = json.loads(judgement.read_text()) if judgement.is_file() else {}
    return {"limit": limit, **found, "verdict": told.get("verdict"), "written": _size(out) if out.is_dir() else 0}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(gigabytes: int, cases: list[str], limit: int, place: Path) -> dict[str, Any]:
    """All that is asked of one checkpoint."""
    model, data = place / "model", place / "data.jsonl"
    model.mkdir()
    layer = make_checkpoint(model, gigabytes * LAYERS_PER_GB)
    make_data(data)
    found: dict[str, Any] = {
        "weights_bytes": _size(model),
        "layer_bytes": layer,
        "layers": gigabytes * LAYERS_PER_GB,
    }
    for case in cases:
        if case == "trace":
            found |= trace(model, data, place, layer)
        elif case == "prune":
            found["prune"] = prune(model, data, place, limit)
        else:
            found[case] = child(model, place / "report.json", 0, case, model, data, place / case)
        print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure what is asked for, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gigabytes", nargs="*", type=int, default=[2])
    parser.add_argument("--cases", default=",".join(CASES), help="of trace, prune, offload and all-experts")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of anonymous memory that prune may take")
    asked = parser.parse_args()
    cases = asked.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    results = {}
    for size in asked.gigabytes:
        with tempfile.TemporaryDirectory(prefix="streaming-") as place:
            results[f"{size} GB"] = measure(size, cases, int(asked.limit * 2**30), Path(place))
    shape = f"hidden {HIDDEN}, {EXPERTS} experts of width {WIDTH}, top-{TOP_K}, bfloat16, {EXAMPLES} x {LENGTH} tokens"
    write("streaming", {"shape": shape, **results})


if __name__ == "__main__":
    main()
