"""What is judged beside a dense model, and what it is called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.errors import UsageError
from shape_moe.evaluation.subjects import open_candidates
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection
from support.data import synthetic_trace


@pytest.fixture(scope="module")
def dense(embedded) -> Snapshot:
    return open_snapshot(embedded)


@pytest.fixture(scope="module")
def selection() -> Selection:
    return replace(select_from_trace(synthetic_trace(4, 32, 4), SelectOptions(keep=0.5)), fingerprint=None)


def names(dense: Snapshot, *given: Path | str | Selection) -> list[str]:
    return [candidate.name for candidate in open_candidates(given, dense)]


def saved(selection: Selection, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    selection.save(file)
    return file


def test_a_selection_is_called_after_its_file_or_what_holds_it(dense, selection, tmp_path, monkeypatch) -> None:
    a, b = (saved(selection, tmp_path / name / "shape" / "selection.json") for name in ("A", "B"))
    gsm8k = saved(selection, tmp_path / "gsm8k.json")
    assert names(dense, a, b, gsm8k) == ["A", "B", "gsm8k"]
    monkeypatch.chdir(saved(selection, tmp_path / "here" / "selection.json").parent)
    assert names(dense, "selection.json") == ["here"]
    assert names(dense, selection) == [f"{selection.method} 0.50"]


def test_what_would_share_a_name_is_called_as_it_was_given(dense, selection, tmp_path, monkeypatch) -> None:
    for name in ("maths", "code"):
        saved(selection, tmp_path / name / "half.json")
    monkeypatch.chdir(tmp_path)
    assert names(dense, "maths/half.json", "code/half.json") == ["maths/half.json", "code/half.json"]
    with pytest.raises(UsageError, match="are called maths/half.json; leave one out"):
        names(dense, "maths/half.json", "maths/half.json")
    with pytest.raises(UsageError, match="are called shape/coverage, drop 0.50"):
        names(dense, selection, selection)
