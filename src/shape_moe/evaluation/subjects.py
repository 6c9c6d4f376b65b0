"""What can be judged beside a dense model: checkpoints, and selections as masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from shape_moe.architectures.fingerprint import check_fingerprint, fingerprint
from shape_moe.architectures.gguf_file import is_gguf
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.same_routers import check_same_model
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.pruning.gguf_slices import embedded_selection
from shape_moe.scoring.scores import Scores, score_trace
from shape_moe.selection.agreement import scoring_of
from shape_moe.selection.selection import Selection, check_against_model, load_selection, open_selection
from shape_moe.tracing.trace import Trace, load_trace


@dataclass(frozen=True)
class Candidate:
    """A model to judge: a checkpoint, or a selection as a mask on the dense model.

    Attributes:
        name: what to call it.
        snapshot: the checkpoint, None for a mask.
        selection: what is kept, None for a checkpoint of another tool.
        trace: what the selection was made from, where it is at hand.
    """

    name: str
    snapshot: Snapshot | None
    selection: Selection | None
    trace: Trace | None

    @property
    def seen(self) -> SeenPrompts:
        """The prompts that it was made from, as far as its trace and its selection name them."""
        return seen_by(self.trace, self.selection)


def seen_by(trace: Trace | None, selection: Selection | None) -> SeenPrompts:
    """The prompts that a model was calibrated or chosen by, as its trace and its selection name them.

    A selection knows those of its trace, and others that decided between candidates.
    """
    known = [SeenPrompts.of_source(trace.info.source)] if trace is not None else []
    known += [SeenPrompts.of_salts(selection.seen)] if selection is not None else []
    return SeenPrompts(tuple(part for seen in known for part in seen.parts), any(seen.complete for seen in known))


def open_candidate(given: str | PathLike[str] | Selection, dense: Snapshot, trace: Trace | None = None) -> Candidate:
    """Look at what is to be judged, before any weight is loaded.

    Args:
        given: folder of a checkpoint, file of a selection, or a selection.
        dense: the model that it is judged beside.
        trace: trace of selections given as files, and of checkpoints that hold none.

    Raises:
        FingerprintError: when it was made from another model.
        CheckpointError: when it cannot be read.
        UsageError: when a selection does not fit the model.
    """
    if isinstance(given, Selection):
        name = f"{given.method} {given.keep:.2f}"
        return _mask(name, given, dense, trace)
    path = Path(given)
    if path.is_file() and not is_gguf(path):
        return _mask(_name_of(path), path, dense, trace)
    snapshot = open_snapshot(given)
    if snapshot.config.get("vocab_size") != dense.config.get("vocab_size"):
        raise CheckpointError(f"{given} has another vocabulary than {dense.name}, so the two cannot be compared.")
    if isinstance(snapshot, GgufModel):
        return _gguf(snapshot, path, dense, trace)
    folder = Path(snapshot.path) / "shape"
    selection = load_selection(folder / "selection.json") if (folder / "selection.json").is_file() else None
    if selection is not None and selection.fingerprint is not None:
        check_fingerprint(selection.fingerprint, fingerprint(dense), f"The checkpoint {given}", force=True)
    own = folder / "trace"
    return Candidate(path.resolve().name, snapshot, selection, load_trace(own) if own.is_dir() else trace)


def _gguf(snapshot: GgufModel, path: Path, dense: Snapshot, trace: Trace | None) -> Candidate:
    """A GGUF file, with the selection in its metadata where it was pruned here."""
    selection = embedded_selection(snapshot)
    if selection is not None and selection.fingerprint is not None and isinstance(dense, GgufModel):
        check_same_model(selection, dense, f"The file {path}", force=True)
    return Candidate(path.resolve().name, snapshot, selection, trace)


def open_candidates(
    given: Sequence[str | PathLike[str] | Selection], dense: Snapshot, trace: Trace | None = None
) -> list[Candidate]:
    """Open all that is to be judged; where two would have the same name, they are called as they were given.

    Raises:
        ShapeMoeError: see :func:`open_candidate`.
        UsageError: when two are named alike even so.
    """
    found = [open_candidate(entry, dense, trace) for entry in given]
    names = [dense.name, *(candidate.name for candidate in found)]
    for i, entry in enumerate(given):
        if not isinstance(entry, Selection) and names.count(found[i].name) > 1:
            found[i] = replace(found[i], name=str(entry))
    names = [dense.name, *(candidate.name for candidate in found)]
    if again := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"Two of the models to evaluate are called {again[0]}; leave one out, or rename it.")
    return found


def _name_of(file: Path) -> str:
    """What a selection's file is called: ``selection.json`` is named after its folder, in a checkpoint after that."""
    if file.name != "selection.json":
        return file.stem
    folder = file.resolve().parent
    return folder.parent.name if folder.name == "shape" else folder.name


def _mask(name: str, given: Path | Selection, dense: Snapshot, trace: Trace | None) -> Candidate:
    selection = open_selection(given, dense, force=True)
    check_against_model(selection, dense.moe, dense.moe_layers, selection.routing)
    return Candidate(name, None, selection, trace)


def scores_of(selection: Selection, trace: Trace) -> Scores:
    """The values that a selection was made from."""
    return score_trace(trace, selection.scorer, scoring_of(selection))
