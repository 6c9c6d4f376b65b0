"""Every tensor of a pruned checkpoint against its slice of the original, byte by byte; and hashes of every file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from shape_moe.architectures.safetensors_file import read_header
from shape_moe.errors import CheckpointError
from shape_moe.pruning.checkpoint import ShardPlan, SlicedTensor

_CHUNK = 4 * 2**20


def compare_shard(plan: ShardPlan, file: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """Compare a written shard with the original, and hash it in the same pass.

    Returns:
        The file's sha256.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    slots, _ = read_header(file)
    if list(slots) != [tensor.name for tensor in plan.tensors]:
        raise CheckpointError(f"{file} does not hold the tensors that it should.")
    digest = hashlib.sha256()
    with file.open("rb") as written, plan.source.open("rb") as source:
        first = min((slot.start for slot in slots.values()), default=0)
        digest.update(written.read(first))
        for tensor in plan.tensors:
            slot = slots[tensor.name]
            if (slot.dtype, slot.shape, slot.size) != (tensor.source.dtype, tensor.shape, tensor.size):
                raise CheckpointError(f"{file}: tensor {tensor.name} has another shape or dtype than it should.")
            for expected in _chunks(source.fileno(), tensor):
                found = written.read(len(expected))
                if found != expected:
                    raise CheckpointError(f"{file}: tensor {tensor.name} differs from the original; prune again.")
                digest.update(found)
                progress(len(found))
    return digest.hexdigest()


def _chunks(source: int, tensor: SlicedTensor) -> Iterator[bytes]:
    for start, size in tensor.ranges:
        for offset in range(0, size, _CHUNK):
            yield os.pread(source, min(_CHUNK, size - offset), start + offset)


def file_hash(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
