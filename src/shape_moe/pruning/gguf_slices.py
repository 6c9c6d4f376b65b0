"""A pruned GGUF file: the kept experts' bytes copied, the metadata kept but for what counts experts.

Quantised blocks run along rows, so an expert is a whole run of bytes in every quantisation: nothing is requantised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from shape_moe.architectures.fingerprint import origin
from shape_moe.architectures.gguf_file import STRING, Entry, GgufHeader, make_entry, make_header, read_gguf
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.json_file import parse_json
from shape_moe.pruning.checkpoint import SlicedTensor, check_fits, slice_tensor
from shape_moe.pruning.kept import Keeping
from shape_moe.selection.selection import Selection, selection_of

MODEL_FILE = "model.gguf"
"""What the file is called while its job is under way."""
SELECTION_KEY, ORIGINAL_KEY = "shape_moe.selection", "shape_moe.original"
DIGEST_KEY, VERSION_KEY = "shape_moe.tensors", "shape_moe.version"
OWN_KEYS = (SELECTION_KEY, ORIGINAL_KEY, DIGEST_KEY, VERSION_KEY)
NO_DIGEST = f"sha256:{'0' * 64}"
"""Stands for the digest of the tensors until they are written."""
_CHUNK = 4 * 2**20
_SPLIT = "split."
_PARAMETERS = "general.parameter_count"
Advance = Callable[[int], None]


@dataclass(frozen=True)
class GgufPlan:
    """A file to be.

    Attributes:
        entries: its metadata, with :data:`NO_DIGEST` for the digest.
        tensors: its tensors, in order, under the names of the file, with the bytes that they are made of.
        alignment: bytes to a multiple of which every tensor begins.
    """

    entries: tuple[Entry, ...]
    tensors: tuple[SlicedTensor, ...]
    alignment: int

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.size for tensor in self.tensors)

    def header(self) -> bytes:
        """The file up to its tensors."""
        described = [(t.name, t.source.dtype, t.shape, t.size) for t in self.tensors]
        return make_header(self.entries, described, self.alignment)


def plan_gguf(source: GgufModel, selection: Selection) -> GgufPlan:
    """Lay a pruned file out.

    Raises:
        UsageError: when the selection does not fit the model, or asks for what llama.cpp does not load.
    """
    check_loadable(selection)
    check_fits(source, selection)
    keeping = Keeping(source.moe.family, source.moe.num_layers, selection.layers, selection.cuts_router)
    tensors = []
    for header in source.headers:
        for stored in header.tensors:
            slot = source.tensors[source.names[stored]]
            found = slice_tensor(keeping, slot)
            if found is not None:
                tensors.append(SlicedTensor(stored, found.shape, slot, found.ranges))
    entries = pruned_metadata(source, selection, sum(prod(tensor.shape) for tensor in tensors))
    return GgufPlan(tuple(entries), tuple(tensors), source.headers[0].alignment)


def check_loadable(selection: Selection) -> None:
    """Refuse a selection that llama.cpp would not load, or would route otherwise.

    Raises:
        UsageError: saying how to select.
    """
    if not selection.cuts_router or selection.equal_count is None:
        what = "different counts in different layers"
        if not selection.cuts_router:
            what = "routing drop" if selection.routing == "drop" else "gate scale trained"
        raise UsageError(
            f"The selection has {what}, and llama.cpp loads GGUF files only with the same number of experts in every "
            "layer, routed among those that are there: select again with --target stock."
        )


def pruned_metadata(source: GgufModel, selection: Selection, parameters: int) -> list[Entry]:
    """The metadata of a pruned file: the original's, but for what counts experts and says what the model is called.

    Args:
        source: the original.
        selection: what is kept.
        parameters: of the pruned model.
    """
    count, entries = selection.equal_count, dict(source.headers[0].entries)
    assert count is not None
    arch, moe = source.architecture.name, source.moe
    changes: dict[str, Any] = {f"{arch}.expert_count": count}
    if name := entries.get("general.name"):
        changes["general.name"] = f"{name.value} pruned to {count} of {moe.num_experts} experts"
    if "general.size_label" in entries:
        changes["general.size_label"] = _size_label(source, count, parameters)
    if _PARAMETERS in entries:
        changes[_PARAMETERS] = parameters
    if nextn := source.config.get("num_nextn_predict_layers"):
        changes[f"{arch}.nextn_predict_layers"] = 0
        changes[f"{arch}.block_count"] = entries[f"{arch}.block_count"].value - nextn
    kept = [
        make_entry(key, entry.kind, changes[key]) if key in changes else entry
        for key, entry in entries.items()
        if not key.startswith(_SPLIT) and key not in OWN_KEYS
    ]
    made_from = {**origin(source), "model": Path(source.name).name}
    own = {
        VERSION_KEY: version("shape-moe"),
        ORIGINAL_KEY: json.dumps(made_from),
        SELECTION_KEY: json.dumps({**selection.to_document(), "model": made_from["model"]}),
        DIGEST_KEY: NO_DIGEST,
    }
    return [*kept, *(make_entry(key, STRING, value) for key, value in own.items())]


def _size_label(source: GgufModel, count: int, parameters: int) -> str:
    """Number of experts and size of one, as converters write them."""
    from gguf.utility import size_label

    moe, layers = source.moe, len(source.moe_layers)
    packed = [slot for name, slot in source.tensors.items() if source.role(name).role == "packed"]
    per_expert = sum(prod(slot.shape) for slot in packed) // moe.num_experts
    return str(size_label(parameters, parameters - per_expert * count, per_expert, count if layers else 0))


def write_gguf(plan: GgufPlan, folder: Path, advance: Advance = lambda _: None) -> Path:
    """Write the file into a folder, under :data:`MODEL_FILE` once it is complete and synced.

    The digest of the tensors is put into the metadata when they are all written.
    """
    file = folder / MODEL_FILE
    temporary = file.with_name(f"{MODEL_FILE}.tmp")
    header, digest = plan.header(), hashlib.sha256()
    with temporary.open("wb") as target:
        target.write(header)
        for chunk in _chunks(plan.tensors):
            target.write(chunk.content)
            digest.update(chunk.content)
            advance(len(chunk.content))
            if chunk.last:
                target.write(bytes(-chunk.tensor.size % plan.alignment))
        target.seek(header.rindex(NO_DIGEST.encode()))
        target.write(f"sha256:{digest.hexdigest()}".encode())
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(file)
    return file


def compare_gguf(plan: GgufPlan, file: Path, advance: Advance = lambda _: None) -> str:
    """Compare a written file with the original, byte by byte, and hash it in the same pass.

    Returns:
        The file's sha256.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    found = read_gguf(file)
    expected = plan.header()
    whole, digest = hashlib.sha256(), hashlib.sha256()
    with file.open("rb") as written:
        begin = written.read(len(expected))
        whole.update(begin)
        for chunk in _chunks(plan.tensors):
            content = written.read(len(chunk.content))
            if content != chunk.content:
                raise CheckpointError(f"{file}: tensor {chunk.tensor.name} differs from the original; prune again.")
            whole.update(content)
            digest.update(content)
            advance(len(content))
            if chunk.last:
                whole.update(written.read(-chunk.tensor.size % plan.alignment))
        if written.read(1):
            raise CheckpointError(f"{file} is longer than it should be; prune again.")
    told = f"sha256:{digest.hexdigest()}"
    place = expected.rindex(NO_DIGEST.encode())
    if (
        found.metadata.get(DIGEST_KEY) != told
        or begin != expected[:place] + told.encode() + expected[place + len(told) :]
    ):
        raise CheckpointError(f"{file}: the metadata are not what they should be; prune again.")
    return whole.hexdigest()


def compare_with_original(plan: GgufPlan, written: GgufHeader, advance: Advance = lambda _: None) -> None:
    """Compare a file with what a plan makes of the original; what the file says of its making apart.

    Raises:
        CheckpointError: naming the first entry or tensor that differs.
    """
    expected = {entry.key: entry for entry in plan.entries if entry.key not in OWN_KEYS}
    found = {key: entry for key, entry in written.entries.items() if key not in OWN_KEYS}
    for key in {**expected, **found}:
        if key not in found or key not in expected or found[key].raw != expected[key].raw:
            raise CheckpointError(f"{written.file}: the entry {key} is not what pruning makes of the original's.")
    if [tensor.name for tensor in plan.tensors] != list(written.tensors):
        raise CheckpointError(f"{written.file} does not hold the tensors that it should.")
    with written.file.open("rb") as stream:
        for chunk in _chunks(plan.tensors):
            tensor = written.tensors[chunk.tensor.name]
            if (tensor.type_name, tensor.shape) != (chunk.tensor.source.dtype, chunk.tensor.shape):
                raise CheckpointError(f"{written.file}: tensor {tensor.name} has another shape or type than it should.")
            if os.pread(stream.fileno(), len(chunk.content), tensor.start + chunk.offset) != chunk.content:
                raise CheckpointError(f"{written.file}: tensor {tensor.name} differs from the original.")
            advance(len(chunk.content))


@dataclass(frozen=True)
class _Chunk:
    tensor: SlicedTensor
    content: bytes
    offset: int

    @property
    def last(self) -> bool:
        """Whether it is the tensor's last."""
        return self.offset + len(self.content) == self.tensor.size


def _chunks(tensors: Sequence[SlicedTensor]) -> Iterator[_Chunk]:
    """The bytes that tensors are made of, in order, some at a time."""
    with ExitStack() as stack:
        opened: dict[Path, BinaryIO] = {}
        for tensor in tensors:
            file = tensor.source.file
            if file not in opened:
                opened[file] = stack.enter_context(file.open("rb"))
            position = 0
            for start, size in tensor.ranges:
                for offset in range(0, size, _CHUNK):
                    wanted = min(_CHUNK, size - offset)
                    content = os.pread(opened[file].fileno(), wanted, start + offset)
                    if len(content) != wanted:
                        raise CheckpointError(f"{file} became shorter while it was read.")
                    yield _Chunk(tensor, content, position)
                    position += wanted


def embedded_selection(model: GgufModel) -> Selection | None:
    """The selection in the metadata of a file that was pruned here, None in others.

    Raises:
        CheckpointError: when it is damaged.
    """
    text = model.metadata.get(SELECTION_KEY)
    if not isinstance(text, str):
        return None
    return selection_of(parse_json(text, f"{SELECTION_KEY} of {model.path}"), model.path)


def tensors_digest(slots: Sequence[TensorSlot]) -> str:
    """The digest of a file's tensors, as :data:`DIGEST_KEY` holds it."""
    digest = hashlib.sha256()
    for chunk in _chunks([SlicedTensor(slot.name, slot.shape, slot, ((slot.start, slot.size),)) for slot in slots]):
        digest.update(chunk.content)
    return f"sha256:{digest.hexdigest()}"
