"""What writes a pruned model: one interface, and the ways there are to write one.

A selection's target names its writer. What a target asks of the selection itself (equal counts, say) is checked where
selections are made; a writer says what it can write, how large that will be, and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.architectures.weight_source import WeightSource
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.progress import Progress
from shape_moe.pruning.bundle import check_settings, copy_code, copy_root_files, write_quantisation_files
from shape_moe.pruning.checkpoint import plan_checkpoint, write_index
from shape_moe.pruning.down_projections import RefittedSelection
from shape_moe.pruning.gguf_slices import MODEL_FILE, compare_gguf, plan_gguf, write_gguf
from shape_moe.pruning.model_config import numbering, pruned_config
from shape_moe.pruning.refitted_tensors import new_tensors, write_refit_file
from shape_moe.pruning.shards import write_compared
from shape_moe.selection.selection import Selection
from shape_moe.workspace import write_json


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: what to open to load it.
        size: bytes of its tensors.
        hashes: sha256 by file name, of the files that were hashed while they were written.
    """

    path: Path
    size: int
    hashes: dict[str, str]


class Writer(Protocol):
    """Writes pruned models in one form."""

    def check(self, source: Snapshot, selection: Selection | None) -> None:
        """Find out before any work whether a model can be written; without a selection, whatever will be kept.

        Raises:
            ShapeMoeError: saying what cannot be written, and what to do.
        """

    def bytes_for(self, source: Snapshot, kept: int) -> int:
        """Bytes of the tensors with ``kept`` experts over all layers, at most."""

    def bytes_there(self, folder: Path) -> int:
        """Bytes that an interrupted run has written already."""

    def write(self, source: Snapshot, selection: Selection, folder: Path, progress: Progress) -> Written:
        """Write the model into a folder, every tensor compared with the original; go on where a run was interrupted.

        Raises:
            ShapeMoeError: when a file cannot be written, or differs from what it should be.
        """


@dataclass(frozen=True)
class SafetensorsFolder:
    """An ordinary model folder: ``config.json``, safetensors, tokenizer.

    Attributes:
        target: ``ragged``: the class ``Shape<Stock>``, whose layers keep different counts, and its code; ``stock``:
            the stock class with a smaller count.
    """

    target: str

    def check(self, source: Snapshot, selection: Selection | None) -> None:
        """See :meth:`Writer.check`."""
        check_settings(source)
        if selection is not None:
            plan_checkpoint(source, selection)
            pruned_config(source.config, source.moe, selection, self.target)

    def bytes_for(self, source: Snapshot, kept: int) -> int:
        """See :meth:`Writer.bytes_for`."""
        return round(measure(source).at_keep(kept))

    def bytes_there(self, folder: Path) -> int:
        """See :meth:`Writer.bytes_there`."""
        return sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")

    def write(self, source: Snapshot, selection: Selection, folder: Path, progress: Progress) -> Written:
        """See :meth:`Writer.write`."""
        new = new_tensors(source, selection) if isinstance(selection, RefittedSelection) else {}
        plans = plan_checkpoint(source, selection, new)
        size = sum(plan.size for plan in plans)
        with progress.phase("Writing and comparing tensors", 2 * size, "B") as advance:
            hashes = write_compared(plans, folder, advance)
        write_index(plans, folder)
        write_json(folder / "config.json", pruned_config(source.config, source.moe, selection, self.target))
        if self.target == "ragged":
            copy_code(folder)
        if new:
            write_refit_file(folder, new)
        copy_root_files(source.path, folder)
        write_quantisation_files(source.path, folder, numbering(source.moe, selection))
        return Written(folder, size, hashes)


@dataclass(frozen=True)
class GgufFile:
    """One GGUF file of a GGUF model, split or not: equal counts, rerouted, as llama.cpp loads it."""

    def check(self, source: Snapshot, selection: Selection | None) -> None:
        """See :meth:`Writer.check`."""
        if selection is not None:
            plan_gguf(_gguf(source), selection)

    def bytes_for(self, source: Snapshot, kept: int) -> int:
        """See :meth:`Writer.bytes_for`."""
        return round(measure(source).at_keep(kept))

    def bytes_there(self, folder: Path) -> int:
        """See :meth:`Writer.bytes_there`."""
        return sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".gguf")

    def write(self, source: Snapshot, selection: Selection, folder: Path, progress: Progress) -> Written:
        """See :meth:`Writer.write`."""
        plan, file = plan_gguf(_gguf(source), selection), folder / MODEL_FILE
        with progress.phase("Writing and comparing tensors", 2 * plan.size, "B") as advance:
            there = file.is_file()
            if not there:
                write_gguf(plan, folder, advance)
            try:
                found = compare_gguf(plan, file, advance)
            except CheckpointError:  # left by an interrupted run and damaged since
                file.unlink()
                if not there:
                    raise
                found = compare_gguf(plan, write_gguf(plan, folder))
        return Written(file, plan.size, {MODEL_FILE: found})


def _gguf(source: Snapshot) -> GgufModel:
    if not isinstance(source, GgufModel):
        raise UsageError(
            f"{source.name} is not a GGUF file: prune it into a folder, and convert that with llama.cpp (--target "
            f"stock)."
        )
    return source


def what_is_left_out(source: WeightSource) -> tuple[str, ...]:
    """What a pruned model does not have although the original has it, beside experts, as sentences."""
    left = sum(source.role(name).layer >= source.moe.num_layers for name in source.tensors)
    if not left:
        return ()
    return (
        f"{left} tensors of multi-token-prediction layers are left out: no example passes through them, so there is "
        "nothing to choose their experts by. The model answers the same; servers cannot use it to draft tokens.",
    )


WRITERS: dict[str, Writer] = {target: SafetensorsFolder(target) for target in ("ragged", "stock")}
"""Who writes what, by the target that a selection is made for."""


def writer_for(source: Snapshot, target: str) -> Writer:
    """The writer of a model's pruned form.

    Raises:
        UsageError: for a target that nobody writes, or that GGUF files cannot have.
    """
    if isinstance(source, GgufModel):
        if target != "stock":
            raise UsageError(
                "llama.cpp loads GGUF files only with the same number of experts in every layer, which target "
                f"{target} does not give: use --target stock."
            )
        return GgufFile()
    if target not in WRITERS:
        raise UsageError(f"Target must be one of {', '.join(WRITERS)}, not {target!r}.")
    return WRITERS[target]
