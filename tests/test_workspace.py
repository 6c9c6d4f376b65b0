"""Result folders: complete or not there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shape_moe import workspace
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.interrupts import DeferredInterrupt
from shape_moe.locks import drop_lock, take_lock
from shape_moe.workspace import Workspace, check_output_file, write_json, write_text
from support.kills import killed_before
from support.lock_stress import stress

JOB = {"verb": "test", "value": 1}
OTHER = {"verb": "test", "value": 2}


def make(out: Path, job=JOB, *, text: str = "new", force: bool = False) -> None:
    """Make a result of two files."""
    with Workspace(out, job, force=force) as work:
        write_text(work.path / "trace.json", text)
        (work.path / "sub").mkdir(exist_ok=True)
        write_text(work.path / "sub" / "more", text)
        work.complete()


def texts(folder: Path) -> set[str]:
    """What the files of a result hold, the record of the job left out."""
    return {file.read_text() for file in folder.rglob("*") if file.is_file() and file.name != "job.json"}


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


def test_two_processes_are_never_inside_one_output(tmp_path) -> None:
    met = stress(tmp_path / "out", 4, 2)
    assert met.keys() <= {"entries", "refused"}, met
    assert met["entries"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_lock_on_a_deleted_file_counts_for_nothing(tmp_path, monkeypatch) -> None:
    """A holder deletes its file while another has it open: that one must not believe that it holds the lock."""
    file = tmp_path / "lock"
    first = take_lock(file)
    assert take_lock(file) is None
    lock, waited = workspace.take_lock.__globals__["_lock"], []

    def locked_late(descriptor, path, *, wait):
        if not waited:  # the holder goes between the opening and the lock, and a third process comes
            waited.append(descriptor)
            drop_lock(file, first)
            waited.append(take_lock(file))
        return lock(descriptor, path, wait=wait)

    monkeypatch.setitem(workspace.take_lock.__globals__, "_lock", locked_late)
    assert take_lock(file) is None
    os.close(waited[1])


def test_a_lock_that_another_holds_stays(tmp_path) -> None:
    with Workspace(tmp_path / "out", JOB):
        for _ in range(2):
            with pytest.raises(ShapeMoeError, match="Another run is at work"), Workspace(tmp_path / "out", JOB):
                pass
        assert (tmp_path / ".out.lock").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "out.partial"] or not list(tmp_path.iterdir())


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
@pytest.mark.parametrize("replaces", [True, False], ids=["replaces", "fresh"])
@pytest.mark.parametrize("next_job", [JOB, OTHER], ids=["same job", "another"])
def test_a_kill_at_any_moment_of_completion(tmp_path, monkeypatch, swaps, replaces, next_job) -> None:
    if not swaps:
        monkeypatch.setattr(workspace, "exchange", lambda _first, _second: False)
    step, finished = 0, False
    while not finished:
        home = tmp_path / str(step)
        home.mkdir()
        out = home / "out"
        if replaces:
            make(out, OTHER, text="old")
        finished = not killed_before(step, lambda out=out: make(out, force=replaces))
        if out.exists():
            assert texts(out) in ({"old"}, {"new"})
        else:
            assert not replaces or not swaps
        if next_job is JOB:
            if replaces or not (out / "trace.json").exists() or (out / "job.json").exists():
                make(out, JOB, force=replaces)
            else:
                with pytest.raises(UsageError, match="exists and is not empty"):
                    make(out, JOB)
            assert texts(out) == {"new"}
            assert [p.name for p in home.iterdir()] == ["out"]
            assert sorted(p.name for p in out.iterdir()) == ["sub", "trace.json"]
        else:
            make(out, OTHER, text="third", force=True)
            assert texts(out) == {"third"}
            assert [p.name for p in home.iterdir()] == ["out"]
        step += 1
    assert step > 5


def test_what_another_run_leaves_is_no_reason_to_lose_a_result(tmp_path, monkeypatch) -> None:
    """Killed between the two renames: the old result has its name again, although nobody asked to replace it."""
    monkeypatch.setattr(workspace, "exchange", lambda _first, _second: False)
    out, step = tmp_path / "out", 0
    make(out, OTHER, text="old")
    while out.exists():
        assert killed_before(step, lambda: make(out, force=True))
        step += 1
    with pytest.raises(UsageError, match="exists and is not empty"), Workspace(out, OTHER):
        pass
    assert texts(out) == {"old"}


def test_a_folder_of_the_user_that_looks_like_a_leftover_stays(tmp_path) -> None:
    (tmp_path / "out.old-0123abcd").mkdir()
    (tmp_path / "out.old-0123abcd" / "precious").write_text("mine")
    make(tmp_path / "out")
    assert (tmp_path / "out.old-0123abcd" / "precious").read_text() == "mine"


def test_a_link_to_a_folder_is_followed(tmp_path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    make(link)
    make(link, OTHER, text="third", force=True)
    assert link.is_symlink()
    assert texts(real) == {"third"}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["disk", "link", "more", "real", "sub", "trace.json"]
    make(tmp_path / "link" / "inner" / "out")
    assert texts(real / "inner" / "out") == {"new"}


def test_outputs_by_two_names_are_one_output(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (
        Workspace(tmp_path / "real", JOB),
        pytest.raises(ShapeMoeError, match="Another run is at work"),
        Workspace(tmp_path / "link", JOB),
    ):
        pass


def test_links_that_point_nowhere(tmp_path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    for out in (link, link / "out"):
        with pytest.raises(UsageError, match=r"link is a link to .*gone, which does not exist"), Workspace(out, JOB):
            pass
        with pytest.raises(UsageError, match=r"link is a link to .*gone, which does not exist"):
            check_output_file(out, force=True)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="loop is a link to"), Workspace(loop, JOB):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "loop"]


def test_what_fills_the_output_meanwhile_is_not_lost(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="exists and is not empty"), Workspace(out, JOB) as work:
        (work.path / "result").write_text("x")
        make(out / "inner", OTHER)
        work.complete()
    assert texts(out / "inner") == {"new"}


def test_half_written_files_of_a_killed_run_go(tmp_path) -> None:
    with pytest.raises(ValueError, match="stop"), Workspace(tmp_path / "out", JOB) as work:
        (work.path / "model.safetensors.tmp").write_text("half")
        (work.path / ".trace.json.tmp").write_text("half")
        raise ValueError("stop")
    make(tmp_path / "out")
    assert texts(tmp_path / "out") == {"new"}


def test_other_package_versions_are_another_job(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="stop"), Workspace(tmp_path / "out", JOB) as work:
        (work.path / "half").write_text("x")
        raise ValueError("stop")
    monkeypatch.setattr(workspace, "versions", lambda *_: {"torch": "0.1"})
    with pytest.raises(UsageError, match="a run with other package versions"), Workspace(tmp_path / "out", JOB):
        pass


def test_jobs_say_what_differs(tmp_path) -> None:
    with pytest.raises(ValueError, match="stop"), Workspace(tmp_path / "out", JOB) as work:
        (work.path / "half").write_text("x")
        raise ValueError("stop")
    with pytest.raises(UsageError, match=r"\(other inputs or options: value\)"), Workspace(tmp_path / "out", OTHER):
        pass


@pytest.mark.parametrize("when", ["while it runs", "before it goes on"])
@pytest.mark.parametrize("change", ["content", "times kept", "replaced", "gone", "added"])
def test_inputs_that_change_are_noticed(tmp_path, when, change) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    file = source / "big.bin"
    with file.open("wb") as stream:
        stream.truncate(20 * 2**20)

    def edit() -> None:
        before = file.stat()
        if change == "added":
            (source / "more").write_text("x")
        elif change == "gone":
            file.unlink()
        else:
            target = file if change != "replaced" else source / "other"
            if change == "replaced":
                target.write_bytes(file.read_bytes())
            with target.open("r+b") as stream:
                stream.seek(7_000_001)
                stream.write(b"y")
            os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
            if change == "replaced":
                target.replace(file)
            elif change == "content":
                os.utime(target)

    with pytest.raises(ShapeMoeError) as refused, Workspace(out, JOB, inputs=[source]) as work:
        (work.path / "half").write_text("x")
        if when == "while it runs":
            edit()
            work.complete()
        raise ShapeMoeError("stop")
    if when == "before it goes on":
        edit()
        with pytest.raises(UsageError) as refused, Workspace(out, JOB, inputs=[source]):
            pass
    assert str(source) in str(refused.value)
    assert "--force" in str(refused.value)
    assert not out.exists()
    with Workspace(out, JOB, inputs=[source], force=True) as work:
        assert not (work.path / "half").exists() or when == "while it runs"
        work.complete()


def test_a_small_file_of_the_same_content_is_the_same(tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    with pytest.raises(ValueError, match="stop"), Workspace(tmp_path / "out", JOB, inputs=[file]) as work:
        (work.path / "half").write_text("x")
        raise ValueError("stop")
    file.unlink()
    file.write_text("{}")
    with Workspace(tmp_path / "out", JOB, inputs=[file]) as work:
        assert work.resumed


def test_a_full_disk_is_one_sentence(tmp_path) -> None:
    import errno

    with pytest.raises(ShapeMoeError, match=r"The disk of .* is full"), Workspace(tmp_path / "out", JOB):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ShapeMoeError, match=r"The disk of .* is full"), Workspace(tmp_path / "out", JOB):
        raise ValueError("IoError(Os { code: 28, kind: StorageFull })")
