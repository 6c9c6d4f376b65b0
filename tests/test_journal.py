"""The journal of finished work: whole lines count, a line cut short does not spoil the next."""

from __future__ import annotations

import pytest

from shape_moe.errors import CheckpointError
from shape_moe.journal import Journal


def test_finished_work_is_found_by_its_key(tmp_path) -> None:
    file = tmp_path / "journal.jsonl"
    journal = Journal(file, "cell", "figures")
    journal.put(("model", "set"), {"kl": 0.5})
    journal.put(("model", "ü\n"), {"kl": 1.5})
    journal.put(("model", "set"), {"kl": 0.25})
    found = Journal(file, "cell", "figures")
    assert found == journal == {("model", "set"): {"kl": 0.25}, ("model", "ü\n"): {"kl": 1.5}}
    assert ("model",) not in found
    assert file.read_text().splitlines()[0] == '{"cell": ["model", "set"], "figures": {"kl": 0.5}}'


def test_a_line_cut_short_is_dropped_and_the_next_one_stands_by_itself(tmp_path) -> None:
    file = tmp_path / "journal.jsonl"
    Journal(file, "key", "sums").put("a", 1)
    with file.open("a") as stream:
        stream.write('{"key": "b", "sums": [1, ')
    journal = Journal(file, "key", "sums")
    assert journal == {"a": 1}
    journal.put("c", 3)
    assert Journal(file, "key", "sums") == {"a": 1, "c": 3}


def test_without_a_file_work_stays_in_memory() -> None:
    journal = Journal(None, "key", "sums")
    journal.put("digest", [1])
    assert journal == {"digest": [1]}


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"key": "a"}', b'{"key": 1, "work": 2}', b"\xff", b"[" * 100_000])
def test_damaged_lines_are_one_sentence(tmp_path, line) -> None:
    file = tmp_path / "journal"
    file.write_bytes(line + b"\n")
    with pytest.raises(CheckpointError, match=r"journal is damaged; delete it"):
        Journal(file, "key", "work")
