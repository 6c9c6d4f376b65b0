"""How much memory this process may still take: what is free on the machine, less where it has been given less."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_SYSTEM = Path("/")


def host_memory(root: Path = _SYSTEM) -> int:
    """Bytes that this process may still take.

    What the machine has free, within the limits of the process's control groups (containers) and of ``ulimit``; of
    several processes that ``torchrun`` has started here, each has its part.

    Args:
        root: where ``/proc`` and ``/sys`` lie.
    """
    import psutil

    found = max(0, min([int(psutil.virtual_memory().available), *_left_in_groups(root), *_left_of_limits()]))
    return found // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def give_back_free_memory() -> None:
    """Give back what the allocator keeps for later, where it can be told to (glibc)."""
    if sys.platform != "linux":
        return
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _left_of_limits() -> Iterator[int]:
    """What ``ulimit -v`` and ``ulimit -d`` leave for a model.

    Half of it: weights are mapped from their files while they are put together, and these limits count both.
    """
    if sys.platform == "win32":
        return
    import resource

    import psutil

    used = psutil.Process().memory_info()
    for which, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", used.rss))):
        limit, _ = resource.getrlimit(which)
        if limit != resource.RLIM_INFINITY:
            yield (limit - taken) // 2


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the limits of the process's control groups leave, those above it included; file cache counts as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            if (left := _left_in(folder, *names)) is not None:
                yield left
            if folder == top:
                break


def _left_in(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - used + int(entries.get(cache, 0))
