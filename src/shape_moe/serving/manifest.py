"""The manifest of a pruned checkpoint: where it comes from, the hash of every file, and a digest over itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from shape_moe.architectures.fingerprint import origin
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.documents import as_shape
from shape_moe.errors import CheckpointError
from shape_moe.job_record import JOB_FILE
from shape_moe.json_file import read_json
from shape_moe.pruning.compare import file_hash
from shape_moe.workspace import write_json

FORMAT_VERSION = 2
"""Version 1 had no digest."""
MANIFEST = Path("shape") / "manifest.json"
_NO_PART = (JOB_FILE, MANIFEST.as_posix())
_HARMLESS = ("*.md", "*.png", "*.jpg", "*.svg", "*.html", "*.csv", "*.log", "*.pdf")
"""What no loader reads, so that it may lie in a checkpoint's folder; hidden files neither."""


@dataclass(frozen=True)
class Manifest:
    """Origin and content of a pruned checkpoint.

    Attributes:
        model: name of the original.
        revision: its commit on the hub.
        fingerprint: identifies it by its routers.
        layout_fingerprint: describes its tensors.
        target: ``ragged`` or ``stock``.
        shape_moe: version that wrote the checkpoint.
        files: sha256 by path relative to the checkpoint.
        canary_missing: why the checkpoint has no canary, None where it has one.
        digest: sha256 over all of the above; None in a manifest of format version 1.
    """

    model: str
    revision: str | None
    fingerprint: str
    layout_fingerprint: str
    target: str
    shape_moe: str
    files: dict[str, str]
    canary_missing: str | None = None
    digest: str | None = None

    def own_digest(self) -> str:
        """The digest that it should have."""
        content = {key: value for key, value in asdict(self).items() if key != "digest"}
        return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"


def write_manifest(
    folder: Path, snapshot: Snapshot, target: str, known: dict[str, str], *, canary_missing: str | None = None
) -> Manifest:
    """Hash every file of a finished checkpoint (``known`` hashes are taken over) and write the manifest."""
    files = {}
    for name in _present(folder):
        if name not in _NO_PART:
            files[name] = known.get(name) or file_hash(folder / name)
    manifest = Manifest(
        **origin(snapshot),
        target=target,
        shape_moe=version("shape-moe"),
        files=files,
        canary_missing=canary_missing,
    )
    manifest = replace(manifest, digest=manifest.own_digest())
    write_json(folder / MANIFEST, to_document(manifest))
    return manifest


def to_document(manifest: Manifest) -> dict[str, Any]:
    """The JSON document."""
    return {"format_version": FORMAT_VERSION, **asdict(manifest)}


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: when it is missing, damaged, edited since it was written, or of another version.
    """
    file = folder / MANIFEST
    document = read_json(file)
    format_version = document.pop("format_version", None)
    if format_version not in (1, FORMAT_VERSION) or isinstance(format_version, bool):
        raise CheckpointError(f"{file} was written in another format version.")
    manifest = as_shape(document, Manifest, file, "a manifest")
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise CheckpointError(f"{file} names a file outside the checkpoint: {name!r}.")
    if format_version == 1 and manifest.digest is None:
        return manifest
    if manifest.digest != manifest.own_digest():
        raise CheckpointError(f"{file} was changed since it was written: its digest is not that of its content.")
    return manifest


def added_files(folder: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Files of a checkpoint's folder that its manifest does not list.

    Returns:
        Those that a loader might read, and the others.
    """
    added = [name for name in _present(folder) if name not in manifest.files and name not in _NO_PART]
    read = [name for name in added if not _is_harmless(name)]
    return read, [name for name in added if name not in read]


def _is_harmless(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or any(fnmatch(path.name.lower(), pattern) for pattern in _HARMLESS)


def _present(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
