"""Results of one file: one run at a time, never in the place of an input, and nothing left behind by a kill."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.output_file import OutputFile
from shape_moe.workspace import write_text
from support.data import synthetic_trace
from support.kills import killed_before


def make(file: Path, text: str = "new", *, force: bool = False) -> None:
    with OutputFile(file, force=force, journal=".journal") as output:
        assert output.journal == file.with_name(f"{file.name}.journal")
        output.journal.write_text("half")
        write_text(file, text)


def test_one_run_at_a_time(tmp_path) -> None:
    file = tmp_path / "f.json"
    (tmp_path / "link").symlink_to(tmp_path / "f.json")
    with OutputFile(file), pytest.raises(ShapeMoeError, match=r"Another run is at work on .*f\.json; wait"):
        make(file)
    file.write_text("old")
    for name in (file, tmp_path / "link"):
        with (
            OutputFile(file, force=True),
            pytest.raises(ShapeMoeError, match="Another run is at work"),
            OutputFile(name, force=True),
        ):
            pass
    with pytest.raises(UsageError, match=r"exists; choose another output"):
        make(file)
    make(tmp_path / "link", force=True)
    assert file.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "link"]


def test_a_file_that_appears_meanwhile_is_not_lost(tmp_path, monkeypatch) -> None:
    """Written by a run that ended between the first look and the lock."""
    from shape_moe import output_file

    file, take_lock = tmp_path / "f.json", output_file.take_lock

    def late(lock: Path) -> int | None:
        file.write_text("another run's")
        return take_lock(lock)

    monkeypatch.setattr(output_file, "take_lock", late)
    with pytest.raises(UsageError, match="exists"):
        make(file)
    assert file.read_text() == "another run's"
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize("replaces", [True, False], ids=["replaces", "fresh"])
def test_a_kill_at_any_moment(tmp_path, replaces) -> None:
    step, finished = 0, False
    while not finished:
        home = tmp_path / str(step)
        home.mkdir()
        file = home / "f.json"
        if replaces:
            make(file, "old")
            os.utime(file, ns=(1, 1))
        finished = not killed_before(step, lambda file=file: make(file, force=replaces))
        if file.exists() and not replaces:
            assert file.read_text() == "new"
            with pytest.raises(UsageError, match="exists"):
                make(file)
        else:
            assert not file.exists() or file.read_text() in ("old", "new")
            make(file, force=replaces)
        assert file.read_text() == "new"
        assert [path.name for path in home.iterdir()] == ["f.json"]
        step += 1
    assert step >= 3


def test_unfinished_work_that_is_to_replace_a_result_stays(tmp_path) -> None:
    file = tmp_path / "f.json"
    file.write_text("old")
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match="stop"), OutputFile(file, force=True, journal=".journal") as output:
        assert output.journal is not None
        output.journal.write_text("half")
        raise ValueError("stop")
    with pytest.raises(UsageError, match="exists"):
        make(file)
    assert (tmp_path / "f.json.journal").read_text() == "half"


def test_inputs_are_never_replaced(tmp_path) -> None:
    synthetic_trace(seed=1).save(tmp_path / "t")
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("data/d.jsonl", "model/config.json", "model/model.safetensors", "s.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "s.json")
    (tmp_path / "t" / "selection.json").write_text("{}")
    (tmp_path / "model" / "evaluation.json").write_text('{"verb": "evaluate"}')
    inputs = [tmp_path / name for name in ("t", "data", "model", "s.json")] + [None, "someone/model"]
    coalitions = next((tmp_path / "t" / "coalitions").iterdir()).relative_to(tmp_path)
    touched = ("t/trace.json", coalitions, "data/d.jsonl", "model/config.json", "model/model.safetensors", "link.json")
    for name in touched:
        with (
            pytest.raises(UsageError, match="is an input of this command; choose another output"),
            OutputFile(tmp_path / name, force=True, inputs=inputs),
        ):
            pass
    for name in ("t/selection.json", "model/evaluation.json", "data/new.json", "t/new.json"):
        with OutputFile(tmp_path / name, force=True, inputs=inputs):
            pass


def test_what_is_no_file_is_not_guarded(tmp_path) -> None:
    with OutputFile(None) as output:
        assert (output.file, output.journal) == (None, None)
    os.mkfifo(tmp_path / "pipe")
    with OutputFile(tmp_path / "pipe"), OutputFile(tmp_path / "pipe"):
        assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
