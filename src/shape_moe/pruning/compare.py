"""Every tensor of a pruned checkpoint against its slice of the original, byte by byte; and hashes of every file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from shape_moe.architectures.safetensors_file import read_header
from shape_moe.errors import CheckpointError
from shape_moe.pruning.checkpoint import ShardPlan, SlicedTensor

_CHUNK = 4 * 2**20


def compare_shard(plan: ShardPlan, file: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """Compare a written shard with the original, new values with their hashes, and hash the shard in the same pass.

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
            if tensor.new is not None:
                _compare_new(file, tensor, written, digest.update)
                progress(tensor.size)
                continue
            for expected in _chunks(source.fileno(), tensor):
                found = written.read(len(expected))
                if found != expected:
                    raise CheckpointError(f"{file}: tensor {tensor.name} differs from the original; prune again.")
                digest.update(found)
                progress(len(found))
    return digest.hexdigest()


def _compare_new(file: Path, tensor: SlicedTensor, written: BinaryIO, also: Callable[[bytes], None]) -> None:
    digest, left = hashlib.sha256(), tensor.size
    assert tensor.new is not None
    while left and (found := written.read(min(_CHUNK, left))):
        digest.update(found)
        also(found)
        left -= len(found)
    if left or digest.hexdigest() != tensor.new.sha256:
        raise CheckpointError(f"{file}: tensor {tensor.name} is not as it was refitted; prune again.")


def _chunks(source: int, tensor: SlicedTensor) -> Iterator[bytes]:
    for start, size in tensor.ranges:
        for offset in range(0, size, _CHUNK):
            yield os.pread(source, min(_CHUNK, size - offset), start + offset)


def file_hash(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
