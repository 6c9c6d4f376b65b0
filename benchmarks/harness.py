"""Interleaved pairs in one run: what is reported is the median of the ratios, not of times on different days."""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def peak_memory() -> int:
    """Largest resident memory of this process in bytes, without what a parent had before it started this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def paired(first: Callable[[], object], second: Callable[[], object], pairs: int, *, warmup: int = 1) -> dict[str, Any]:
    """Time two pieces of work in turn, A B A B ...

    Returns:
        Medians in seconds, and the median, smallest and largest of the ratios first / second, pair by pair.
    """
    for _ in range(warmup):
        first()
        second()
    times = [(seconds(first), seconds(second)) for _ in range(pairs)]
    ratios = [a / b for a, b in times]
    return {
        "pairs": pairs,
        "first_seconds": statistics.median(a for a, _ in times),
        "second_seconds": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_smallest": min(ratios),
        "ratio_largest": max(ratios),
    }


def write(name: str, results: dict[str, Any]) -> None:
    """Write results with what is needed to read them later, and show them."""
    import torch

    document = {
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "numpy", "shape-moe")},
        },
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: {json.dumps(results, indent=2)}", flush=True)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
