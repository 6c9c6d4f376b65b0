"""The journal of finished work: whole lines count, a line cut short does not spoil the next."""

from __future__ import annotations

from shape_moe.journal import Journal, Known


def test_entries_come_back(tmp_path):
    file = tmp_path / "journal.jsonl"
    journal = Journal(file)
    journal.add({"a": 1})
    journal.add({"text": "ü\n"})
    assert Journal(file).entries == journal.entries == [{"a": 1}, {"text": "ü\n"}]


def test_a_line_cut_short_is_dropped_and_the_next_one_stands_by_itself(tmp_path):
    file = tmp_path / "journal.jsonl"
    Journal(file).add({"a": 1})
    with file.open("a") as stream:
        stream.write('{"a": 2, "b": [1, ')
    journal = Journal(file)
    assert journal.entries == [{"a": 1}]
    journal.add({"a": 3})
    assert Journal(file).entries == [{"a": 1}, {"a": 3}]


def test_without_a_file_entries_stay_in_memory():
    journal = Journal(None)
    journal.add({"a": 1})
    assert journal.entries == [{"a": 1}]


def test_finished_work_is_found_by_its_key(tmp_path) -> None:
    file = tmp_path / "journal.jsonl"
    known = Known(file, "cell", "figures")
    known.put(("model", "set"), {"kl": 0.5})
    known.put(("model", "other"), {"kl": 1.5})
    known.put(("model", "set"), {"kl": 0.25})
    found = Known(file, "cell", "figures")
    assert found == known == {("model", "set"): {"kl": 0.25}, ("model", "other"): {"kl": 1.5}}
    assert ("model",) not in found
    assert file.read_text().splitlines()[0] == '{"cell": ["model", "set"], "figures": {"kl": 0.5}}'


def test_a_key_may_be_a_single_word(tmp_path) -> None:
    file = tmp_path / "journal.jsonl"
    Known(file, "key", "sums").put("digest", [1, 2])
    assert Known(file, "key", "sums") == {"digest": [1, 2]}
    nowhere = Known(None, "key", "sums")
    nowhere.put("digest", [1])
    assert nowhere["digest"] == [1]
