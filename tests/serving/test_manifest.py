"""The manifest lists what a checkpoint is made of, also after a run was killed while it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.jobs.verify import check_files
from shape_moe.progress import SILENT
from shape_moe.serving.manifest import read_manifest, write_manifest
from shape_moe.workspace import Workspace, write_json, write_text
from support.kills import killed_before


def checkpoint(out: Path, snapshot: Snapshot, *, force: bool = False) -> None:
    """What prune does at its end: small files, the manifest, and the final name."""
    with Workspace(out, {"verb": "prune"}, force=force, inputs=[snapshot.path]) as work:
        (work.path / "shape").mkdir(exist_ok=True)
        write_json(work.path / "config.json", {"a": 1})
        write_text(work.path / "shape" / "selection.json", "{}")
        write_manifest(work.path, snapshot, "ragged", {})
        work.complete()


@pytest.mark.parametrize("force", [True, False])
def test_a_kill_at_any_moment_leaves_what_verifies(embedded, tmp_path, force) -> None:
    snapshot, step, finished = open_snapshot(embedded), 0, False
    while not finished:
        home = tmp_path / str(step)
        home.mkdir()
        out = home / "out"
        if force:
            checkpoint(out, snapshot)
        finished = not killed_before(step, lambda out=out: checkpoint(out, snapshot, force=force))
        if out.exists():
            assert check_files(out, SILENT)[0]
        if force or not out.exists() or (out / "job.json").exists():
            checkpoint(out, snapshot, force=force)
        passed, detail = check_files(out, SILENT)
        assert passed, detail
        assert detail == "2 files have their recorded sha256"
        assert read_manifest(out).files.keys() == {"config.json", "shape/selection.json"}
        assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == {
            "config.json",
            "shape/selection.json",
            "shape/manifest.json",
        }
        step += 1
    assert step > 8
