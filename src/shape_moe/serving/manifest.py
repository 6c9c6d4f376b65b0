"""The manifest of a pruned checkpoint: where it comes from, and the hash of every file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from shape_moe.architectures.fingerprint import origin
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import CheckpointError
from shape_moe.json_file import read_json
from shape_moe.pruning.compare import file_hash
from shape_moe.workspace import JOB_FILE, write_json

FORMAT_VERSION = 1
MANIFEST = Path("shape") / "manifest.json"


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
    """

    model: str
    revision: str | None
    fingerprint: str
    layout_fingerprint: str
    target: str
    shape_moe: str
    files: dict[str, str]
    canary_missing: str | None = None


def write_manifest(
    folder: Path, snapshot: Snapshot, target: str, known: dict[str, str], *, canary_missing: str | None = None
) -> Manifest:
    """Hash every file of a finished checkpoint (``known`` hashes are taken over) and write the manifest."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name not in (JOB_FILE, MANIFEST.as_posix()):
            files[name] = known.get(name) or file_hash(file)
    manifest = Manifest(
        **origin(snapshot),
        target=target,
        shape_moe=version("shape-moe"),
        files=files,
        canary_missing=canary_missing,
    )
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **asdict(manifest)})
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: when it is missing, damaged or of another version.
    """
    document = read_json(folder / MANIFEST)
    if document.pop("format_version", None) != FORMAT_VERSION:
        raise CheckpointError(f"{folder / MANIFEST} was written in another format version.")
    try:
        return Manifest(**document)
    except TypeError as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged.") from error
