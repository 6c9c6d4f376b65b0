"""All shards of a pruned checkpoint: written and compared with the original side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shape_moe.errors import CheckpointError, ShapeMoeError
from shape_moe.pruning.checkpoint import ShardPlan, write_shard
from shape_moe.pruning.compare import compare_shard

_WORKERS = 2


def write_compared(plans: Sequence[ShardPlan], folder: Path, advance: Callable[[int], None]) -> dict[str, str]:
    """Write every shard and compare every tensor with the original.

    Args:
        plans: the shards.
        folder: where they are written; what an interrupted run left there is used.
        advance: called with bytes written, and again with bytes compared.

    Returns:
        The sha256 of each file.

    Raises:
        ShapeMoeError: when a file cannot be written or differs; work on the others stops.
    """
    hashes: dict[str, str] = {}
    stop = threading.Event()

    def step(count: int) -> None:
        if stop.is_set():
            raise ShapeMoeError("Stopped, because another file failed.")
        advance(count)

    def work(plan: ShardPlan) -> None:
        file = write_shard(plan, folder, step)
        try:
            hashes[plan.file_name] = compare_shard(plan, file, step)
        except CheckpointError:  # left by an interrupted run and damaged since
            file.unlink()
            hashes[plan.file_name] = compare_shard(plan, write_shard(plan, folder), lambda _: None)

    with ThreadPoolExecutor(_WORKERS) as pool:
        try:
            for done in [pool.submit(work, plan) for plan in plans]:
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return hashes
