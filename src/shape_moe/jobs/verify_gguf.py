"""Verify a pruned GGUF file: is it, byte by byte and answer by answer, what it claims to be?"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from shape_moe.architectures.fingerprint import check_fingerprint, fingerprint
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.loading import load_model, load_tokenizer, loaded_bytes, why_not_loadable
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.jobs.pruned_place import beside, made_by
from shape_moe.json_file import parse_json
from shape_moe.progress import Progress
from shape_moe.pruning.canary import compare_canary, load_canary
from shape_moe.pruning.compare import file_hash
from shape_moe.pruning.gguf_slices import (
    DIGEST_KEY,
    MODEL_FILE,
    ORIGINAL_KEY,
    SELECTION_KEY,
    compare_with_original,
    embedded_selection,
    plan_gguf,
    tensors_digest,
)
from shape_moe.selection.selection import Selection
from shape_moe.serving.manifest import MANIFEST, read_manifest
from shape_moe.units import readable_share

Outcome = tuple[bool | None, str]
Checks = dict[str, Callable[[], Outcome]]


def open_pruned(file: Path) -> tuple[GgufModel, Selection]:
    """A pruned GGUF file and the selection in its metadata.

    Raises:
        CheckpointError: when it was not written by this tool, or its metadata are damaged.
    """
    model = open_snapshot(file)
    selection = embedded_selection(model) if isinstance(model, GgufModel) else None
    if not isinstance(model, GgufModel) or selection is None:
        raise CheckpointError(f"{file} was not written by shape-moe: its metadata hold no {SELECTION_KEY}.")
    return model, selection


def gguf_checks(
    file: Path, original: str | PathLike[str] | None, endpoint: str | None, device: str, dtype: str, progress: Progress
) -> Checks:
    """What is checked of a pruned GGUF file, by name.

    Raises:
        CheckpointError: when it was not written by this tool.
        UsageError: for an endpoint: llama.cpp's server does not give what the canary asks for.
    """
    if endpoint is not None:
        raise UsageError("A GGUF file is checked here, not at an endpoint: leave --endpoint out.")
    model, selection = open_pruned(file)
    checks: Checks = {
        "files": lambda: _check_digest(model, file),
        "selection and metadata": lambda: _check_counts(model, selection),
        "tokenizer": lambda: _check_tokenizer(model),
    }
    if original is not None:
        checks["original"] = lambda: _check_original(model, selection, original, progress)
    checks["canary"] = lambda: _check_canary(model, made_by(file) or beside(file), device, dtype)
    return checks


def _check_digest(model: GgufModel, file: Path) -> Outcome:
    if tensors_digest(list(model.tensors.values())) != model.metadata.get(DIGEST_KEY):
        return False, "tensors were changed: their sha256 is not the one in the metadata"
    folder = made_by(file)
    if folder is None or not (folder / MANIFEST).is_file():
        return True, "the tensors have the sha256 in the metadata"
    if read_manifest(folder).files.get(MODEL_FILE) != file_hash(file):
        return False, f"the file was changed: its sha256 is not the one in {folder / MANIFEST}"
    return True, f"the tensors have the sha256 in the metadata, and the file that in {folder / MANIFEST}"


def _check_counts(model: GgufModel, selection: Selection) -> Outcome:
    if model.moe.num_experts != selection.equal_count:
        return False, f"the metadata say {model.moe.num_experts} experts, the selection {selection.equal_count}"
    if set(model.moe_layers) != set(selection.layers):
        return False, "the selection names other layers than those that have experts"
    return True, f"{selection.kept:,} of {selection.total:,} experts, {selection.equal_count} in every layer"


def _check_tokenizer(model: GgufModel) -> Outcome:
    if not model.metadata.get("tokenizer.ggml.tokens"):
        return None, "the file has none"
    ids, vocabulary = len(load_tokenizer(model.path)), int(model.config["vocab_size"])
    return True, f"{ids:,} ids; the model embeds {vocabulary:,}"


def _check_original(model: GgufModel, selection: Selection, given: str | PathLike[str], progress: Progress) -> Outcome:
    original = open_snapshot(given)
    if not isinstance(original, GgufModel):
        return False, f"{given} is not a GGUF file"
    made_from: Any = parse_json(model.metadata[ORIGINAL_KEY], ORIGINAL_KEY)
    check_fingerprint(made_from["fingerprint"], fingerprint(original), "The file")
    plan = plan_gguf(original, selection)
    with progress.phase("Comparing tensors", plan.size, "B") as advance:
        compare_with_original(plan, model.headers[0], advance)
    return True, f"{len(plan.tensors):,} tensors equal their slice of {given}, and so do the metadata"


def _check_canary(model: GgufModel, folder: Path, device: str, dtype: str) -> Outcome:
    file = folder / "shape" / "canary.json"
    if not file.is_file():
        return None, f"there is no {file}"
    if (reason := why_not_loadable(loaded_bytes(model, dtype), device)) is not None:
        return None, reason
    found = compare_canary(load_model(model, device=device, dtype=dtype), load_canary(file))
    return found.passed, (
        f"KL {found.mean_kl:.2e}, top-1 agreement {readable_share(found.top1_agreement)}, largest difference "
        f"{found.largest_difference:.2e} over {found.positions:,} positions"
    )
