"""Refitted down projections as tensors of a checkpoint: in the source's names, layout and dtype, with their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.families import Family
from shape_moe.architectures.plain_model import is_stored_plain
from shape_moe.architectures.safetensors_file import TensorSlot
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.architectures.tensor_names import down_projection
from shape_moe.errors import CheckpointError, UnsupportedModelError, UsageError
from shape_moe.json_file import read_json
from shape_moe.pruning.checkpoint import NewValues
from shape_moe.pruning.down_projections import RefittedSelection
from shape_moe.pruning.kept import Keeping
from shape_moe.selection.selection import Selection
from shape_moe.workspace import write_json

if TYPE_CHECKING:
    import torch

REFIT_FILE = Path("shape") / "refit.json"
FORMAT_VERSION = 1
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def check_refittable(source: Snapshot) -> None:
    """Refuse a model whose refitted down projections cannot be written in its own format.

    Raises:
        UnsupportedModelError: naming the format, and what to do.
    """
    if (reason := why_not_refittable(source)) is not None:
        raise UnsupportedModelError(reason)


def why_not_refittable(source: Snapshot) -> str | None:
    """Why refitted down projections cannot be written in a model's own format, and what to do; None where they can."""
    name = source.name
    family = source.moe.family
    if family.why_no_refit is not None:
        return f"A refit is not possible for {family.model_type}: {family.why_no_refit}; leave --refit out."
    if source.path.is_file():
        return (
            f"{name} is a GGUF file, whose quantised blocks cannot hold refitted weights: prune the original model "
            "with --refit on --target stock and convert the result with llama.cpp, or leave --refit out."
        )
    stored = _stored_dtypes(source)
    if is_stored_plain(source) and len(stored) == 1 and stored <= set(_DTYPES):
        return None
    label = ", ".join(sorted(stored)) or "a layout that is not known"
    if source.quantisation is not None:
        label = source.quantisation.label
    return (
        f"{name} stores its experts as {label}, in which refitted weights cannot be written: dequantise the model "
        "first (load it in Transformers and save it by save_pretrained) and prune that, or leave --refit out."
    )


def stored_dtype(source: Snapshot) -> torch.dtype:
    """The dtype of the down projections of a model that can be refitted."""
    import torch

    (stored,) = _stored_dtypes(source)
    found: torch.dtype = getattr(torch, _DTYPES[stored])
    return found


def _stored_dtypes(source: Snapshot) -> set[str]:
    family = source.moe.family
    return {slot.dtype for name, slot in source.tensors.items() if down_projection(family, name) is not None}


def new_tensors(source: Snapshot, selection: RefittedSelection) -> dict[str, NewValues]:
    """The refitted tensors by their names in the pruned checkpoint.

    Args:
        source: the original.
        selection: what is kept, and its weights.

    Raises:
        UsageError: when the weights do not fit the model's tensors.
    """
    keeping = Keeping(source.moe.family, source.moe.num_layers, selection.layers, selection.cuts_router)
    found: dict[str, NewValues] = {}
    layers = set()
    for name, slot in source.tensors.items():
        part, role = down_projection(source.moe.family, name), source.role(name)
        kept = keeping.tensor(name)
        if part is None or kept is None or role.layer not in selection.weights:
            continue
        row = selection.layers[role.layer].index(role.expert) if role.role == "expert" else None
        read = partial(_bytes_of, selection, role.layer, part, row, slot)
        found[kept[0]] = NewValues(hashlib.sha256(read()).hexdigest(), read)
        layers.add(role.layer)
    if layers != set(selection.weights):
        raise UsageError(f"The model has no down projections of layer {min(set(selection.weights) - layers)}.")
    return found


def _bytes_of(selection: RefittedSelection, layer: int, part: str, row: int | None, slot: TensorSlot) -> memoryview:
    import torch

    whole = selection.weights[layer].named().get(part)
    shape = slot.shape if row is not None else (len(selection.layers[layer]), *slot.shape[1:])
    values = whole if whole is None or row is None else whole[row]
    if values is None or tuple(values.shape) != shape:
        raise UsageError(f"The refitted weights of layer {layer} do not fit {slot.name}.")
    stored = values.to(getattr(torch, _DTYPES[slot.dtype])).contiguous().cpu()
    found: memoryview = stored.view(-1).view(torch.uint8).numpy().data
    return found


def write_refit_file(folder: Path, new: Mapping[str, NewValues]) -> None:
    """Write which tensors of a checkpoint are refitted, each with the hash of its bytes."""
    (folder / REFIT_FILE).parent.mkdir(exist_ok=True)
    tensors = {name: values.sha256 for name, values in sorted(new.items())}
    write_json(folder / REFIT_FILE, {"format_version": FORMAT_VERSION, "tensors": tensors})


def read_refit_file(folder: Path, selection: Selection, family: Family) -> dict[str, NewValues]:
    """The refitted tensors of a checkpoint, by their hashes; none where its selection tells of no refit.

    Raises:
        CheckpointError: when the file and the selection do not belong together, or it names anything else than kept
            experts' down projections.
    """
    file = folder / REFIT_FILE
    if not file.is_file():
        if selection.refit is not None and any(said.get("rho") for said in selection.refit.get("layers", ())):
            raise CheckpointError(f"{folder} is refitted, but {REFIT_FILE} is missing.")
        return {}
    document = read_json(file)
    tensors = document.get("tensors") if isinstance(document, dict) else None
    if document.get("format_version") != FORMAT_VERSION or not isinstance(tensors, dict) or selection.refit is None:
        raise CheckpointError(f"{file} does not belong to shape/selection.json, or is of another format version.")
    for name, digest in tensors.items():
        if down_projection(family, name) is None or not isinstance(digest, str):
            raise CheckpointError(f"{file} names {name}, which is no down projection of an expert.")
    return {name: NewValues(digest) for name, digest in tensors.items()}
