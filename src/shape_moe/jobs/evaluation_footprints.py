"""Memory and speed of what is evaluated, each model in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence

from shape_moe.architectures.loading import release_memory
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import ShapeMoeError
from shape_moe.evaluation.evaluated import Evaluated
from shape_moe.evaluation.footprint import Workload, measure_footprint
from shape_moe.evaluation.subjects import Candidate
from shape_moe.progress import Progress


def measure_footprints(
    models: Sequence[Evaluated],
    dense: Snapshot,
    candidates: Sequence[Candidate],
    workload: Workload,
    *,
    device: str,
    dtype: str,
    progress: Progress,
) -> list[str]:
    """Measure the dense model and the checkpoints, once nothing else is loaded.

    Args:
        models: what is evaluated; their figures are filled in.
        dense: the dense model on disk.
        candidates: what is judged beside it; masks have no weights of their own.
        workload: what to time.
        device: where to run.
        dtype: in which dtype.
        progress: where to show progress.

    Returns:
        What could not be measured, as sentences.
    """
    release_memory()
    failures = []
    paths = {dense.name: dense.path}
    paths |= {entry.name: entry.snapshot.path for entry in candidates if entry.snapshot is not None}
    with progress.phase("Measuring memory and speed", len(paths), "model") as advance:
        for found in models:
            if found.name in paths:
                try:
                    found.footprint = measure_footprint(
                        paths[found.name],
                        device=device,
                        dtype=dtype,
                        workload=workload,
                        trust_remote_code=dense.trust_remote_code,
                    )
                except ShapeMoeError as error:  # what was judged before is worth keeping
                    failures.append(str(error))
                advance(1)
    return failures
