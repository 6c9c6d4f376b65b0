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
from shape_moe.evaluation import by_layers
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.evaluation.verdict import Word
from shape_moe.jobs import session as sessions
from shape_moe.jobs.choice import ChoiceOptions
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import AUTO, as_select_options
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.verify import verify
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing import streams
from support.data import write_lines
from support.interruptions import stopped_after
from support.notes import Notes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = examples("sorting", 60, seed=1)
    return str(write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", rows))


def asked(data: str, keep: float = 0.5, **changes) -> PruneOptions:
    traced = ExampleOptions(DataOptions(data, samples=12), answers=AnswerOptions(batch_size=4))
    judged = JudgementOptions(examples=20, general=False, minutes=None)
    entries = {"select": as_select_options(keep), "trace": traced, "device": "cpu", "dtype": "float32"}
    return PruneOptions(**{**entries, "judgement": judged, **changes})


def read_sizes(monkeypatch) -> list[int]:
    """How many streams went through the layers in each judging."""
    sizes, real = [], by_layers.run_streams

    def counted(model, batches, streams, *arguments, **more):
        sizes.append(len(streams))
        return real(model, batches, streams, *arguments, **more)

    monkeypatch.setattr(by_layers, "run_streams", counted)
    return sizes


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


def test_candidates_are_judged_in_one_reading_and_the_choice_is_that_in_memory(
    embedded, data, tmp_path, monkeypatch
) -> None:
    automatic = {
        "select": SelectOptions(0.5, Method(AUTO, "coverage", "drop")),
        "choice": ChoiceOptions(held_out_samples=20, rules=("coverage",)),  # layers are measured in memory alone
    }
    whole = prune(embedded, tmp_path / "whole", asked(data, stream=False, **automatic))
    monkeypatch.setattr(sessions, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    told, sizes = Notes(), read_sizes(monkeypatch)
    streamed = prune(embedded, tmp_path / "streamed", asked(data, stream=True, **automatic), progress=told)
    assert streamed.selection.layers == whole.selection.layers
    ours, theirs = (result.selection.choice for result in (streamed, whole))
    assert [tried["method"] for tried in ours["tried"]] == [tried["method"] for tried in theirs["tried"]]
    for one, other in zip(ours["tried"], theirs["tried"], strict=True):
        assert one["kl"]["value"] == pytest.approx(other["kl"]["value"], rel=1e-4)
    candidates, judged = (note for note in told.said if "are read 1 time for that" in note)
    assert "and the dense model are judged layer by layer on 20 examples: the weights (" in candidates
    assert judged.startswith("1 selection and the dense model")
    assert len(sizes) == 2  # one reading for all candidates, one for the judgement


def test_the_smallest_rate_within_a_limit_takes_few_readings(embedded, data, tmp_path, little_memory, monkeypatch):
    """Two rounds of seven rates would leave 1/64; the third finds the rate to one percentage point."""
    told, sizes = Notes(), read_sizes(monkeypatch)
    choice = ChoiceOptions(Limit("max_kl", 0.05), held_out_samples=20)
    result = prune(embedded, tmp_path / "out", asked(data, keep=1.0, choice=choice, judgement=None), progress=told)
    tried = result.selection.choice["tried"]
    assert len(tried) == 21
    assert min(abs(entry["keep"] - result.selection.keep) for entry in tried) == 0
    assert len(sizes) == 3
    assert any("looked for in 3 rounds; each reads the weights anew" in note for note in told.said)
    assert "exact_match" not in result.selection.choice["reason"]


def test_a_judgement_that_was_stopped_goes_on(embedded, data, tmp_path, little_memory, monkeypatch) -> None:
    monkeypatch.setattr(streams, "SAVE_SHARE", 1e9)
    expected = prune(embedded, tmp_path / "expected", asked(data))
    real = by_layers.MaskedStream.through
    stopped, done = stopped_after(2, real)
    monkeypatch.setattr(by_layers.MaskedStream, "through", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune(embedded, tmp_path / "out", asked(data))
    again, later = stopped_after(10**6, real)
    monkeypatch.setattr(by_layers.MaskedStream, "through", again)
    result = prune(embedded, tmp_path / "out", asked(data))
    assert result.judgement.to_document() == expected.judgement.to_document()
    assert [layer for _, _, layer, *_ in done] == [0, 1]  # one batch
    assert [layer for _, _, layer, *_ in later] == [2, 3]
    assert not (result.path / "judgement.partial").exists()


def test_what_only_free_answers_can_say_is_refused(embedded, data, tmp_path, little_memory) -> None:
    generation = GenerationOptions(answer_pattern="[a-z]+")
    choice = ChoiceOptions(Limit("max_drop", 0.3), held_out_samples=20, generation=generation)
    with pytest.raises(UsageError, match="--answer-pattern judges free answers.*use --max-kl"):
        prune(embedded, tmp_path / "out", asked(data, keep=1.0, choice=choice))


def test_answers_that_nobody_can_write_leave_it_unmeasured(embedded, data, tmp_path, little_memory) -> None:
    """Prompts alone are traced; to be judged they need answers."""
    rows = [{"prompt": row["prompt"]} for row in examples("sorting", 40, seed=1)]
    source = str(write_lines(tmp_path / "prompts.jsonl", rows))
    traced = ExampleOptions(DataOptions(source, samples=12), answers=AnswerOptions(max_new_tokens=0))
    result = prune(embedded, tmp_path / "out", asked(source, trace=traced))
    assert result.judgement is not None
    assert result.judgement.verdict.word is Word.NOT_MEASURED
    assert "no token that could be scored" in result.judgement.verdict.reason
