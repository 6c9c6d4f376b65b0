"""Verify a pruned checkpoint: is it, byte by byte and answer by answer, what it claims to be?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shape_moe.architectures.config_file import with_text_part
from shape_moe.architectures.fingerprint import check_fingerprint, fingerprint
from shape_moe.architectures.gguf_file import is_gguf
from shape_moe.architectures.loading import load_model, load_tokenizer, loaded_bytes, why_not_loadable
from shape_moe.architectures.moe_config import PRUNING_KEY, MoeConfig, read_moe_config
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.architectures.tensor_names import tensor_role
from shape_moe.errors import CheckpointError, ShapeMoeError, UsageError, first_line
from shape_moe.jobs.verify_gguf import gguf_checks
from shape_moe.openai_server import OpenAIServer
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.canary import CanaryResult, compare_canary, load_canary
from shape_moe.pruning.checkpoint import plan_checkpoint
from shape_moe.pruning.compare import compare_shard, file_hash
from shape_moe.pruning.model_config import pruning_description, up_to_date
from shape_moe.pruning.refitted_tensors import read_refit_file
from shape_moe.selection.selection import Selection, load_selection
from shape_moe.serving.endpoint import ask_canary, compare_tokens
from shape_moe.serving.manifest import added_files, read_manifest
from shape_moe.units import readable_share

_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, RuntimeError)
"""What a damaged file can make the libraries raise."""

_SHOWN = 3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: True or False, None when it could not be checked.
        detail: what was found.
    """

    name: str
    passed: bool | None
    detail: str


def verify(
    folder: str | PathLike[str],
    *,
    original: str | PathLike[str] | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
    served_as: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = SILENT,
) -> list[Check]:
    """Check a pruned checkpoint.

    Args:
        folder: the checkpoint, or a pruned GGUF file.
        original: the model that it was made from; compares every tensor with its slice once more.
        revision: branch, tag or commit of the original, where it is on the hub.
        endpoint: address of an OpenAI-compatible server that serves the checkpoint; the canary is asked there instead
            of here.
        served_as: the name under which it serves the checkpoint, None for its first model.
        device: where to run the canary.
        dtype: in which dtype.
        progress: where to show progress.

    Returns:
        One entry per check; none of them raises for a bad checkpoint.

    Raises:
        CheckpointError: when the folder is not a pruned checkpoint at all.
        UsageError: for a revision without an original.
    """
    path = Path(folder)
    if revision is not None and original is None:
        raise UsageError("--revision says which version of --original is meant: name the original, or leave it out.")
    if is_gguf(path):
        found = gguf_checks(path, original, endpoint, device, dtype, progress)
        return [_guard(name, check) for name, check in found.items()]
    if not (path / "shape" / "manifest.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint written by shape-moe: it has no shape/manifest.json.")
    checks = [_guard("files", lambda: check_files(path, progress))]
    checks.append(_guard("selection and config", lambda: _check_config(path)))
    checks.append(_guard("tensors", lambda: _check_tensors(path)))
    checks.append(_guard("tokenizer", lambda: _check_tokenizer(path)))
    if original is not None:
        checks.append(_guard("original", lambda: _check_original(path, original, revision, progress)))
    if endpoint is None:
        checks.append(_guard("canary", lambda: _check_canary(path, device, dtype)))
    else:
        checks.append(_guard("endpoint's tokens", lambda: _check_endpoint_tokens(path, endpoint, served_as)))
        checks.append(_guard("endpoint's canary", lambda: _check_endpoint(path, endpoint, served_as)))
    return checks


def _guard(name: str, check: Callable[[], tuple[bool | None, str]]) -> Check:
    try:
        passed, detail = check()
    except ShapeMoeError as error:
        passed, detail = False, str(error)
    except _DAMAGE as error:
        passed, detail = False, f"cannot be read ({type(error).__name__}: {first_line(error)})"
    return Check(name, passed, detail)


def check_files(path: Path, progress: Progress) -> tuple[bool, str]:
    """Compare the files of a checkpoint with its manifest: what was changed, is missing or was added.

    Returns:
        Whether they are as recorded, and what was found.

    Raises:
        CheckpointError: when the manifest is missing, damaged or was edited.
    """
    manifest = read_manifest(path)
    missing = [name for name in manifest.files if not (path / name).is_file()]
    if missing:
        return False, f"{len(missing)} files are missing, the first is {missing[0]}"
    with progress.phase("Hashing files", len(manifest.files), "file") as advance:
        for name, expected in manifest.files.items():
            if file_hash(path / name) != expected:
                return False, f"{name} was changed: its sha256 is not the recorded one"
            advance(1)
    read, others = added_files(path, manifest)
    if read:
        return False, f"{_named(read)}: not part of the checkpoint, and loaders may read what was added"
    detail = f"{len(manifest.files)} files have their recorded sha256"
    if others:
        detail += f"; {_named(others)}: not part of the checkpoint, and no loader reads it"
    if manifest.digest is None:
        detail += "; the manifest is of an older version without a digest, so what it says itself was not checked"
    return True, detail


def _named(files: list[str]) -> str:
    shown = ", ".join(files[:_SHOWN])
    return f"{shown} and {len(files) - _SHOWN} more" if len(files) > _SHOWN else shown


def original_moe(snapshot: Snapshot, selection: Selection) -> MoeConfig:
    """Facts about the original's experts, from a pruned checkpoint's configuration."""
    config = {key: value for key, value in snapshot.config.items() if key != PRUNING_KEY}
    moe = read_moe_config(config)
    for key in moe.family.count_keys:
        if config.get(key) is not None:
            config[key] = selection.num_experts
    return read_moe_config(config)


def _check_config(path: Path) -> tuple[bool, str]:
    snapshot, selection, target = open_snapshot(path), load_selection(path), read_manifest(path).target
    moe = original_moe(snapshot, selection)
    kept = f"{selection.kept:,} of {selection.total:,} experts, routing {selection.method.routed}, target {target}"
    if target == "stock":
        counts = {snapshot.config[key] for key in moe.family.count_keys if snapshot.config.get(key) is not None}
        if counts != {selection.equal_count} or PRUNING_KEY in snapshot.config:
            return False, f"config.json says {counts} experts, the selection {selection.equal_count}"
        return True, kept
    if up_to_date(snapshot.config.get(PRUNING_KEY)) != pruning_description(moe, selection):
        return False, f"config.json's {PRUNING_KEY} is not what shape/selection.json says"
    return True, kept


def _check_tensors(path: Path) -> tuple[bool, str]:
    snapshot, selection = open_snapshot(path), load_selection(path)
    moe = original_moe(snapshot, selection)
    seen: dict[tuple[int, str], set[int]] = {}
    for name, slot in snapshot.tensors.items():
        role = tensor_role(moe.family, name)
        if role.layer not in selection.layers:
            continue
        count = len(selection.layers[role.layer])
        rows = selection.num_experts if role.role == "router" and not selection.cuts_router else count
        if role.role in ("packed", "router") and slot.shape[0] != rows:
            return False, f"{name} has {slot.shape[0]} rows instead of {rows}"
        if role.role == "expert":
            suffix = name.split(f".experts.{role.expert}.", 1)[1]
            seen.setdefault((role.layer, suffix), set()).add(role.expert)
    for (layer, suffix), found in seen.items():
        if found != set(range(len(selection.layers[layer]))):
            return False, f"layer {layer}: {suffix} is there for {len(found)} experts, not as selected"
    return True, f"{len(snapshot.tensors):,} tensors, {snapshot.total_bytes / 2**20:,.1f} MiB, counts as selected"


def _check_tokenizer(path: Path) -> tuple[bool, str]:
    tokenizer, config = load_tokenizer(path), open_snapshot(path).config
    ids, vocabulary = len(tokenizer), int(with_text_part(config)["vocab_size"])
    if ids > vocabulary:
        return False, f"the tokenizer has {ids:,} ids, the model embeds {vocabulary:,}"
    return True, f"{ids:,} ids"


def _check_original(
    path: Path, original: str | PathLike[str], revision: str | None, progress: Progress
) -> tuple[bool, str]:
    snapshot, selection, manifest = open_snapshot(original, revision), load_selection(path), read_manifest(path)
    check_fingerprint(manifest.fingerprint, fingerprint(snapshot), "The checkpoint")
    new = read_refit_file(path, selection, snapshot.moe.family)
    plans = plan_checkpoint(snapshot, selection, new)
    with progress.phase("Comparing tensors", sum(plan.size for plan in plans), "B") as advance:
        for plan in plans:
            compare_shard(plan, path / plan.file_name, advance)
    sliced = f"{sum(len(plan.tensors) for plan in plans) - len(new):,} tensors equal their slice of {original}"
    return True, sliced + (f"; {len(new):,} down projections are as they were refitted" if new else "")


def _check_canary(path: Path, device: str, dtype: str) -> tuple[bool | None, str]:
    file = path / "shape" / "canary.json"
    if not file.is_file():
        reason = read_manifest(path).canary_missing
        return None, f"the checkpoint has none: {reason or 'it was made without one'}"
    snapshot, canary = open_snapshot(path), load_canary(file)
    reason = why_not_loadable(loaded_bytes(snapshot, dtype), device)
    if reason is not None:
        return None, reason
    result = compare_canary(load_model(snapshot, device=device, dtype=dtype), canary)
    return result.passed, _detail(result)


def _detail(result: CanaryResult) -> str:
    return (
        f"KL {result.mean_kl:.2e}, top-1 agreement {readable_share(result.top1_agreement)}, largest difference "
        f"{result.largest_difference:.2e} over {result.positions:,} positions"
    )


def _check_endpoint(path: Path, endpoint: str, served_as: str | None) -> tuple[bool, str]:
    canary = load_canary(path / "shape" / "canary.json")
    with OpenAIServer(endpoint) as server:
        result = ask_canary(server, served_as or server.model(), canary)
    if result.passed:
        return True, _detail(result)
    return False, f"{_detail(result)}: another model answers there, or experts are not served as they are on disk"


def _check_endpoint_tokens(path: Path, endpoint: str, served_as: str | None) -> tuple[bool, str]:
    canary = load_canary(path / "shape" / "canary.json")
    with OpenAIServer(endpoint) as server:
        sent, different = compare_tokens(server, served_as or server.model(), canary, load_tokenizer(path))
    if different:
        return False, f"{different} of {sent} texts become other tokens there: another tokenizer is in use"
    return True, f"{sent} texts become the same tokens"
