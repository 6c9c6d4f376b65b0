"""Where a pruned GGUF file and the folder beside it get their names: together, whatever happens in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from shape_moe import workspace
from shape_moe.errors import UsageError
from shape_moe.jobs.pruned_place import made_by, place_of
from shape_moe.pruning.gguf_slices import MODEL_FILE
from shape_moe.workspace import write_text
from support.kills import killed_before

JOB, OTHER = {"verb": "test", "value": 1}, {"verb": "test", "value": 2}


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "source" / "model.gguf"


def make(source: Path, out: Path, job=JOB, *, text: str = "new", force: bool = False, rejected: bool = False) -> None:
    """Make a file and its folder as pruning does."""
    place = place_of(source, out)
    place.check([source], force=force, rejects=True)
    with place.workspace(job, [source], force=force, rejects=True) as work:
        (work.path / "shape").mkdir(exist_ok=True)
        write_text(work.path / MODEL_FILE, f"GGUF {text}")
        write_text(work.path / "shape" / "manifest.json", text)
        place.complete(work, rejected=rejected)


def check_belongs(file: Path) -> None:
    """What stands under the final name is whole, and what lies beside it, if anything, was made with it."""
    if file.exists():
        text = file.read_text().removeprefix("GGUF ")
        assert text in ("old", "new", "third")
        folder = made_by(file)
        assert folder is None or (folder / "shape" / "manifest.json").read_text() == text


CASES = {
    "swap, replaces": (True, True, False, JOB),
    "swap, fresh": (True, False, False, JOB),
    "two renames, replaces": (False, True, False, JOB),
    "two renames, fresh": (False, False, False, JOB),
    "swap, replaces, then another": (True, True, False, OTHER),
    "two renames, fresh, then another": (False, False, False, OTHER),
    "swap, replaces, rejected": (True, True, True, JOB),
    "two renames, fresh, rejected": (False, False, True, JOB),
}


@pytest.mark.parametrize(("swaps", "replaces", "rejected", "next_job"), CASES.values(), ids=CASES)
def test_a_kill_at_any_moment_of_completion(tmp_path, source, monkeypatch, swaps, replaces, rejected, next_job) -> None:
    if not swaps:
        monkeypatch.setattr(workspace, "exchange", lambda _first, _second: False)
    names = ["a.rejected.gguf", "a.shape.rejected"] if rejected else ["a.gguf", "a.shape"]
    step, finished = 0, False
    while not finished:
        home = tmp_path / str(step)
        home.mkdir()
        out, file = home / "a.gguf", home / names[0]
        if replaces:
            make(source, out, OTHER, text="old", rejected=rejected)
        finished = not killed_before(step, lambda out=out: make(source, out, force=replaces, rejected=rejected))
        check_belongs(file)
        again = {"job": JOB, "text": "new"} if next_job is JOB else {"job": OTHER, "text": "third"}
        named = file.exists() and not (home / names[1] / "job.json").exists()
        if named and not replaces and next_job is JOB:
            with pytest.raises(UsageError, match=r"exists"):
                make(source, out, rejected=rejected)
        else:
            make(source, out, **again, force=replaces or next_job is OTHER, rejected=rejected)
        assert file.read_text() == f"GGUF {again['text']}"
        assert sorted(path.name for path in home.iterdir()) == names
        assert made_by(file) == (None if rejected else home / "a.shape")
        assert sorted(path.name for path in (home / names[1]).iterdir()) == ["shape"]
        check_belongs(file)
        step += 1
    assert step > 5


def test_a_link_is_followed(tmp_path, source) -> None:
    """File and folder lie where the link points to, and are found by either name."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real.gguf").write_text("GGUF before")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "disk" / "real.gguf")
    with pytest.raises(UsageError, match="exists; choose another output"):
        make(source, tmp_path / "link.gguf")
    make(source, tmp_path / "link.gguf", force=True)
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "disk" / "real.gguf").read_text() == "GGUF new"
    for name in ("link.gguf", "disk/real.gguf"):
        assert made_by(tmp_path / name) == tmp_path / "disk" / "real.shape"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link.gguf", "source"]
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "gone.gguf")
    with pytest.raises(UsageError, match=r"nowhere\.gguf is a link to .*gone\.gguf, which does not exist"):
        make(source, tmp_path / "nowhere.gguf")
