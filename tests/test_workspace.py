"""Result folders: complete or not there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.interrupts import DeferredInterrupt
from shape_moe.workspace import Workspace, check_output_file, write_json, write_text

JOB = {"verb": "test", "value": 1}


def test_the_folder_appears_when_complete(tmp_path) -> None:
    out = tmp_path / "out"
    with Workspace(out, JOB) as work:
        assert not work.resumed
        (work.path / "result").write_text("x")
        assert not out.exists()
        assert work.complete() == out
    assert [p.name for p in out.iterdir()] == ["result"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_same_job_finds_its_work_and_another_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="stop"), Workspace(tmp_path / "out", JOB) as work:
        (work.path / "half").write_text("x")
        raise ValueError("stop")
    with pytest.raises(UsageError, match="another job"), Workspace(tmp_path / "out", {**JOB, "value": 2}):
        pass
    with Workspace(tmp_path / "out", JOB) as work:
        assert work.resumed
        assert (work.path / "half").read_text() == "x"
    with Workspace(tmp_path / "out", {**JOB, "value": 2}, force=True) as work:
        assert not work.resumed
        assert not (work.path / "half").exists()


def test_nothing_is_left_of_a_job_that_did_nothing(tmp_path) -> None:
    with pytest.raises(ValueError, match="stop"), Workspace(tmp_path / "out", JOB) as work:
        (work.path / "empty").mkdir()
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_share_a_folder(tmp_path) -> None:
    with Workspace(tmp_path / "out", JOB) as work:
        (work.path / "half").write_text("x")
        with pytest.raises(ShapeMoeError, match="Another run is at work"), Workspace(tmp_path / "out", JOB):
            pass
        assert (work.path / "half").exists()


def test_files_are_no_folders(tmp_path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="is a file"), Workspace(tmp_path / "out", JOB):
        pass


def test_empty_folders_are_fine(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with Workspace(tmp_path / "out", JOB) as work:
        (work.path / "result").write_text("x")
        work.complete()
    assert (tmp_path / "out" / "result").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored in a job that a shell started in the background
    with DeferredInterrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.noted
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_files_are_old_or_new(tmp_path) -> None:
    file = tmp_path / "f.txt"
    write_text(file, "ä\n")
    assert file.read_bytes() == b"\xc3\xa4\n"
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "begun, but \ud800")
    assert file.read_bytes() == b"\xc3\xa4\n"
    write_json(file, {"a": [1, tmp_path]})
    assert file.read_text() == f'{{\n "a": [\n  1,\n  "{tmp_path}"\n ]\n}}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_links_stay_and_pipes_are_written_to(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    file, link = tmp_path / "real" / "f.txt", tmp_path / "link"
    link.symlink_to(file)
    write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    reader, writer = os.pipe()
    try:
        write_text(Path(f"/dev/fd/{writer}"), "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
        os.close(writer)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["f.txt", "link", "real"]


def test_output_files_are_checked(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output_file(Path("f.txt"), force=False)
    Path("f.txt").touch()
    with pytest.raises(UsageError, match=r"f\.txt exists; choose another output, or replace it with --force"):
        check_output_file(Path("f.txt"), force=False)
    check_output_file(Path("f.txt"), force=True)
    for force in (False, True):
        with pytest.raises(UsageError, match="is a folder; choose a file"):
            check_output_file(tmp_path, force=force)
        with pytest.raises(UsageError, match=r"There is no folder nowhere"):
            check_output_file(Path("nowhere", "f.txt"), force=force)
