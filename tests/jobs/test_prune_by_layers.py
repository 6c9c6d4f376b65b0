"""Pruning a model that does not fit into memory: traced, written and judged layer by layer."""

from __future__ import annotations

import json

import pytest
import torch

from shape_moe.architectures import loading
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.evaluation.verdict import Word
from shape_moe.jobs import session as sessions
from shape_moe.jobs.choice import ChoiceOptions
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import as_select_options
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.verify import verify
from support.data import write_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = examples("sorting", 60, seed=1)
    return str(write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", rows))


def asked(data: str, keep: float = 0.5, **changes) -> PruneOptions:
    traced = ExampleOptions(DataOptions(data, samples=12), answers=AnswerOptions(batch_size=4))
    judged = JudgementOptions(examples=20, general=False, minutes=None)
    entries = {"select": as_select_options(keep), "trace": traced, "device": "cpu", "dtype": "float32"}
    return PruneOptions(**{**entries, "judgement": judged, **changes})


@pytest.fixture
def little_memory(monkeypatch) -> None:
    """Less than the model takes; whoever loads it all the same is stopped."""
    monkeypatch.setattr(loading, "host_memory", lambda: 8 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sessions, "load_model", lambda *_a, **_k: pytest.fail("loaded"))


def test_the_result_is_that_of_the_model_in_memory(embedded, data, tmp_path, monkeypatch) -> None:
    whole = prune(embedded, tmp_path / "whole", asked(data, stream=False))
    monkeypatch.setattr(sessions, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    streamed = prune(embedded, tmp_path / "streamed", asked(data, stream=True))
    assert streamed.selection.layers == whole.selection.layers
    shards = [sorted(result.path.glob("*.safetensors")) for result in (streamed, whole)]
    assert [file.read_bytes() for file in shards[0]] == [file.read_bytes() for file in shards[1]]
    assert streamed.judgement is not None
    assert whole.judgement is not None
    ours, theirs = ({f.figure: f for f in result.judgement.verdict.falls} for result in (streamed, whole))
    exact = next(figure for figure in ours if figure in theirs)
    assert ours[exact].shares == theirs[exact].shares
    assert ours[exact].examples == theirs[exact].examples == 20
    assert ours[exact].kl == pytest.approx(theirs[exact].kl, rel=1e-4)
    assert streamed.judgement.verdict.answers is None
    said = " ".join(streamed.judgement.lines())
    assert "likelihood alone never makes a model safe" in said
    assert "Judged layer by layer, by the likelihood of the right answers; for free answers" in said
    assert streamed.logits is None
    assert streamed.logits_skipped == "--stream was given"


def test_without_the_option_free_memory_decides(embedded, data, tmp_path, little_memory) -> None:
    result = prune(embedded, tmp_path / "out", asked(data, keep=1.0))
    assert result.judgement is not None
    assert result.judgement.verdict.word is Word.NO_LOSS
    assert "8.00 MiB are free" in (result.logits_skipped or "")
    checks = verify(result.path, device="cpu")
    assert [check for check in checks if check.passed is False] == []
    assert json.loads((result.path / "shape" / "judgement.json").read_text())["verdict"] == "no loss seen"


def test_a_finished_trace_is_enough(embedded, data, tmp_path, little_memory) -> None:
    first = prune(embedded, tmp_path / "first", asked(data))
    options = asked(data, trace=None)
    again = prune(embedded, tmp_path / "again", options, trace=first.path / "shape" / "trace")
    assert again.selection.layers == first.selection.layers
    assert again.judgement is not None
    assert again.judgement.verdict.falls


def test_candidates_are_not_judged_layer_by_layer_and_that_is_said_first(
    embedded, data, tmp_path, little_memory
) -> None:
    with pytest.raises(
        UsageError, match=r"whole model in memory, which takes 12.94 MiB \(8.00 MiB are free\).*--scorer"
    ):
        prune(embedded, tmp_path / "out", asked(data, choice=ChoiceOptions()))


def test_answers_that_nobody_can_write_leave_it_unmeasured(embedded, data, tmp_path, little_memory) -> None:
    """Prompts alone are traced; to be judged they need answers."""
    rows = [{"prompt": row["prompt"]} for row in examples("sorting", 40, seed=1)]
    source = str(write_lines(tmp_path / "prompts.jsonl", rows))
    traced = ExampleOptions(DataOptions(source, samples=12), answers=AnswerOptions(max_new_tokens=0))
    result = prune(embedded, tmp_path / "out", asked(source, trace=traced))
    assert result.judgement is not None
    assert result.judgement.verdict.word is Word.NOT_MEASURED
    assert "no token that could be scored" in result.judgement.verdict.reason
