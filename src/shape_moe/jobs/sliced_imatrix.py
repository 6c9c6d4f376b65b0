"""The imatrix of a pruned model, sliced from the original's, so that the pruned model can be quantised anew by it."""

from __future__ import annotations

from pathlib import Path

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import DataError, UsageError
from shape_moe.interop.imatrix import Imatrix, read_imatrix, sliced, write_imatrix
from shape_moe.selection.selection import Selection

NAME = "imatrix"


def open_imatrix(file: Path, snapshot: Snapshot, target: str) -> Imatrix:
    """Read the imatrix of a model that is to be pruned, and check that it is this model's.

    Args:
        file: the imatrix.
        snapshot: the model.
        target: what it is pruned for.

    Raises:
        UsageError: for a target that keeps different numbers of experts, which no imatrix can describe.
        DataError: when it is damaged, or of another model.
    """
    if target != "stock":
        raise UsageError(
            "An imatrix describes the same number of experts in every layer: --imatrix goes with --target stock."
        )
    if not file.is_file():
        raise UsageError(f"There is no file {file} (--imatrix).")
    found = read_imatrix(file)
    for layer in snapshot.moe_layers:
        if found.experts(layer, "down", snapshot.moe.num_experts) is None:
            raise DataError(f"{file} is of another model: it holds no experts of layer {layer}.")
    return found


def write_sliced(imatrix: Imatrix, snapshot: Snapshot, selection: Selection, folder: Path) -> Path:
    """Write the pruned model's imatrix into a folder, complete under its name.

    Raises:
        DataError: when it is of another model.
    """
    file = folder / f"{NAME}{imatrix.suffix}"
    temporary = folder / f"{file.name}.tmp"
    write_imatrix(sliced(imatrix, selection, snapshot.moe.num_layers), temporary)
    temporary.replace(file)
    return file
