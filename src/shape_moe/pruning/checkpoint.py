"""The shard slicer: byte ranges of the kept experts' tensors, copied shard by shard; no model is built.

Memory does not grow with the model: tensors are never read, the operating system copies ranges from file to file.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

from shape_moe.architectures.model_folder import INDEX_FILE, SINGLE_FILE
from shape_moe.architectures.safetensors_file import TensorSlot, byte_size, make_header, read_header
from shape_moe.architectures.weight_source import WeightSource
from shape_moe.errors import CheckpointError, ShapeMoeError, UsageError
from shape_moe.pruning.kept import Keeping
from shape_moe.selection.selection import Selection, check_against_model

Progress = Callable[[int], None]
_BLOCK = 64 * 2**20
_BUFFER = 4 * 2**20


@dataclass(frozen=True)
class NewValues:
    """Values that a tensor of the pruned checkpoint has instead of the original's: those of a refit.

    Attributes:
        sha256: of their bytes.
        read: gives the bytes; None where only their hash is known, which is enough to compare.
    """

    sha256: str
    read: Callable[[], bytes | memoryview] | None = None


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor of the pruned checkpoint and where its bytes come from.

    Attributes:
        name: its name in the pruned checkpoint.
        shape: its shape there.
        source: the tensor of the original.
        ranges: byte ranges (start, size) of the original's file, in order.
        new: what stands in their place, None where they are copied.
    """

    name: str
    shape: tuple[int, ...]
    source: TensorSlot
    ranges: tuple[tuple[int, int], ...]
    new: NewValues | None = None

    @property
    def size(self) -> int:
        """Bytes in the pruned checkpoint; what is copied keeps the blocks that it is stored in, quantised or not."""
        if self.new is not None:
            return byte_size(self.source.dtype, self.shape)
        return sum(size for _, size in self.ranges)


@dataclass(frozen=True)
class ShardPlan:
    """One file of the pruned checkpoint."""

    file_name: str
    source: Path
    tensors: tuple[SlicedTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of tensors in the file."""
        return sum(tensor.size for tensor in self.tensors)


def check_fits(snapshot: WeightSource, selection: Selection) -> None:
    """Check that a selection describes this model's layers and experts.

    Raises:
        UsageError: when it does not.
    """
    check_against_model(selection, snapshot.moe, snapshot.moe_layers, selection.routing)
    missing = set(snapshot.moe_layers) - set(selection.layers)
    if missing:
        raise UsageError(f"The selection does not name layer {min(missing)}, which is an MoE layer of the model.")


def plan_checkpoint(
    snapshot: WeightSource, selection: Selection, new: Mapping[str, NewValues] | None = None
) -> list[ShardPlan]:
    """Lay the pruned checkpoint out: one file per shard of the original, without those that end up empty.

    Args:
        snapshot: the original.
        selection: what is kept.
        new: tensors of the pruned checkpoint, by their names there, that have other values than the original's.

    Raises:
        UsageError: when the selection does not fit the model.
    """
    check_fits(snapshot, selection)
    keeping = Keeping(snapshot.moe.family, snapshot.moe.num_layers, selection.layers, selection.cuts_router)
    shards = []
    for source, slots in snapshot.files():
        found = (tensor for slot in slots if (tensor := slice_tensor(keeping, slot)) is not None)
        tensors = tuple(replace(tensor, new=new.get(tensor.name)) if new else tensor for tensor in found)
        if tensors:
            shards.append((source, tensors))
    if len(shards) == 1:
        return [ShardPlan(SINGLE_FILE, *shards[0])]
    return [
        ShardPlan(f"model-{i:05d}-of-{len(shards):05d}.safetensors", source, tensors)
        for i, (source, tensors) in enumerate(shards, start=1)
    ]


def slice_tensor(keeping: Keeping, slot: TensorSlot) -> SlicedTensor | None:
    """What is kept of a tensor, None where nothing is."""
    found = keeping.tensor(slot.name)
    if found is None:
        return None
    name, rows = found
    if rows is None:
        return SlicedTensor(name, slot.shape, slot, ((slot.start, slot.size),))
    along = keeping.dimension(slot.name)
    before = math.prod(slot.shape[:along])
    whole = slot.size // before
    row = whole // slot.shape[along]
    ranges = tuple(
        (slot.start + part * whole + first * row, count * row) for part in range(before) for first, count in _runs(rows)
    )
    return SlicedTensor(name, (*slot.shape[:along], len(rows), *slot.shape[along + 1 :]), slot, ranges)


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Maximal runs of consecutive ids as (first, count)."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ids)) if b != a + 1), len(ids)]
    for begin, end in pairwise(starts):
        yield ids[begin], end - begin


def write_shard(plan: ShardPlan, folder: Path, progress: Progress = lambda _: None) -> Path:
    """Write one file of the pruned checkpoint, unless an earlier run has completed it.

    The bytes go to a temporary name, are synced to disk, and get their name last.

    Raises:
        ShapeMoeError: when the disk is full.
    """
    file = folder / plan.file_name
    if file.is_file() and _matches(file, plan):
        progress(plan.size)
        return file
    temporary = file.with_name(file.name + ".tmp")
    specs = {tensor.name: (tensor.source.dtype, tensor.shape) for tensor in plan.tensors}
    try:
        with plan.source.open("rb") as source, temporary.open("wb") as target:
            target.write(make_header(specs, {"format": "pt"}))
            target.flush()
            for is_new, tensors in groupby(plan.tensors, lambda tensor: tensor.new is not None):
                if is_new:
                    _write_new(target.fileno(), tensors, progress)
                    continue
                for start, size in _joined(piece for tensor in tensors for piece in tensor.ranges):
                    _copy_range(source.fileno(), target.fileno(), start, size, progress)
            os.fsync(target.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ShapeMoeError(
                f"The disk of {folder.parent} is full: {plan.file_name} needs {plan.size / 2**20:,.0f} MiB. "
                "Free some space and run the same command again; it resumes where it stopped."
            ) from error
        raise
    temporary.replace(file)
    return file


def _write_new(target: int, tensors: Iterable[SlicedTensor], progress: Progress) -> None:
    for tensor in tensors:
        assert tensor.new is not None
        assert tensor.new.read is not None, "a plan that only compares"
        content, written = memoryview(tensor.new.read()).cast("B"), 0
        while written < len(content):
            written += os.write(target, content[written : written + _BLOCK])
        progress(written)


def _matches(file: Path, plan: ShardPlan) -> bool:
    """Whether a file of an earlier run has the planned layout (its bytes are compared by the verification)."""
    try:
        slots, _ = read_header(file)
    except CheckpointError:
        return False
    found = [(slot.name, slot.dtype, slot.shape) for slot in sorted(slots.values(), key=lambda slot: slot.start)]
    return found == [(tensor.name, tensor.source.dtype, tensor.shape) for tensor in plan.tensors]


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join ranges that follow each other without a gap."""
    begin = end = -1
    for start, size in ranges:
        if start == end:
            end += size
            continue
        if end > begin:
            yield begin, end - begin
        begin, end = start, start + size
    if end > begin:
        yield begin, end - begin


def _copy_range(source: int, target: int, start: int, size: int, progress: Progress) -> None:
    """Append a byte range of one file to another, inside the kernel where it can."""
    while size > 0:
        count = _copy_some(source, target, start, min(size, _BLOCK))
        if count == 0:
            raise CheckpointError("A shard of the model became shorter while it was read.")
        start, size = start + count, size - count
        progress(count)


def _copy_some(source: int, target: int, start: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, size, start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
    block = os.pread(source, min(size, _BUFFER), start)
    written = 0
    while written < len(block):
        written += os.write(target, block[written:])
    return len(block)


def write_index(plans: list[ShardPlan], folder: Path) -> None:
    """Write the index of a checkpoint of several files."""
    if len(plans) == 1:
        return
    weight_map = {tensor.name: plan.file_name for plan in plans for tensor in plan.tensors}
    index = {
        "metadata": {"total_size": sum(plan.size for plan in plans)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
