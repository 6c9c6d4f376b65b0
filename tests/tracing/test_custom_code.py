"""Code that comes with a model: run where the user trusts it and it can be traced, refused by name elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import UnsupportedModelError
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.progress import Silent
from shape_moe.selection.select import SelectOptions
from support.data import write_lines
from support.own_code import FICKLE, OTHER, SAME, with_code


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_lines(tmp_path / "data.jsonl", examples("sorting", 3, seed=1))


def options(data: Path, *, trusted: bool) -> ExampleOptions:
    return ExampleOptions(data=DataOptions(str(data)), device="cpu", trust_remote_code=trusted)


def test_code_is_run_where_it_is_trusted(embedded, data, tmp_path) -> None:
    """The trace is that of the stock class, or that of the code, which reads its input backwards."""
    folder, notes = with_code(embedded, tmp_path / "model", OTHER), Notes()
    stock = trace(folder, options(data, trusted=False), progress=notes)
    assert notes.lines[-1:] == [
        "The model names code of its own (modeling_own.OwnForCausalLM); Transformers' own Qwen3MoeForCausalLM is used "
        "instead."
    ]
    plain = trace(embedded, options(data, trusted=False))
    assert all(np.array_equal(stock.statistics[name], plain.statistics[name]) for name in plain.statistics)
    notes.lines.clear()
    own = trace(folder, options(data, trusted=True), progress=notes)
    assert notes.lines[-1:] == ["The code that comes with the model is used (modeling_own.OwnForCausalLM)."]
    assert not np.array_equal(own.sums("tokens"), plain.sums("tokens"))
    assert own.sums("tokens").sum() == plain.sums("tokens").sum()


def test_code_whose_logits_change_while_it_is_traced(embedded, data, tmp_path) -> None:
    folder = with_code(embedded, tmp_path / "model", FICKLE)
    with pytest.raises(UnsupportedModelError, match=r"\(OwnForCausalLM\) gives other logits while it is traced"):
        trace(folder, options(data, trusted=True))


def test_pruned_models_do_not_run_the_originals_code(embedded, data, tmp_path) -> None:
    folder, notes = with_code(embedded, tmp_path / "model", SAME), Notes()
    asked = PruneOptions(SelectOptions(0.6), device="cpu", trust_remote_code=True)
    result = prune(folder, tmp_path / "out", asked, data=options(data, trusted=True), progress=notes)
    assert "The code that comes with the model is used (modeling_own.OwnForCausalLM)." in notes.lines
    assert result.logits is not None
    assert result.logits.passed
    assert not (tmp_path / "out" / "modeling_own.py").exists()
