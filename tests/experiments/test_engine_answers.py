"""A grid judged in an engine that takes selections as masks: the same answers, and nothing but answers."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest

import shape_moe
from shape_moe.architectures.loading import load_model
from shape_moe.calibration.responses import greedy_answers
from shape_moe.errors import UsageError
from shape_moe.experiments import grid as grid_module
from shape_moe.experiments.reader import read_config
from shape_moe.pruning.masks import masked
from support.served_grid import write_grid


class Engine:
    """Stands for vLLM: the dense model in Transformers, masked while it is asked to be."""

    made: ClassVar[list] = []

    def __init__(self, snapshot, longest, dtype, arguments) -> None:
        self.longest, self.arguments, self.closed, self.masks = longest, arguments, False, 0
        self.model = load_model(snapshot, device="cpu", dtype=dtype)
        self.made.append(self)

    @contextmanager
    def masked(self, selection):
        self.masks += 1
        with masked(self.model, selection):
            yield

    def answers(self, prompts, limit, stops):
        assert max(map(len, prompts)) + limit <= self.longest
        found = {}
        room = dict.fromkeys(range(len(prompts)), limit)
        for batch in greedy_answers(self.model, dict(enumerate(prompts)), room, batch_size=4, pad_id=0):
            found |= batch
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:
        self.closed = True


def test_answers_are_those_of_the_masked_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(grid_module, "MaskedEngine", Engine)
    monkeypatch.setattr(Engine, "made", [])
    grid = read_config(write_grid(tmp_path, generate=4))
    expected = shape_moe.experiment(grid, tmp_path / "transformers").document
    served = replace(grid, engine="vllm", engine_args={"seed": 1})
    found = shape_moe.experiment(served, tmp_path / "vllm").document
    (engine,) = Engine.made
    assert (engine.closed, engine.masks, engine.arguments) == (True, 2, {"seed": 1})
    assert [cell["routing"] for cell in found["cells"]] == ["drop", "reroute"]
    for ours, theirs in zip(found["cells"], expected["cells"], strict=True):
        assert ours["sets"]["sorts"]["generation"] == theirs["sets"]["sorts"]["generation"]
        assert ours["sets"]["sorts"]["quality"] == {}
    dense, wanted = (document["dense"][0]["sets"]["sorts"] for document in (found, expected))
    assert dense["generation"] == wanted["generation"]
    assert (dense["examples"], dense["generated"]) == (wanted["examples"], 4)
    text = (tmp_path / "vllm" / "experiment.md").read_text()
    assert "Exact match of free answers" in text
    assert "log-likelihood" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "slow"}, "transformers or vllm, not 'slow'"),
        ({"engine_args": {"seed": 1}}, "go with --engine vllm"),
        ({"engine": "vllm", "evaluation": "likelihood"}, "evaluation likelihood has none"),
    ],
)
def test_what_an_engine_cannot_judge_is_refused(tmp_path, changes, words) -> None:
    evaluation = {"likelihood": {"data": "sorting.jsonl"}}
    silent = changes.pop("evaluation", None) is not None
    grid = read_config(write_grid(tmp_path, generate=2, **({"evaluation": evaluation} if silent else {})))
    with pytest.raises(UsageError, match=words):
        replace(grid, **changes)
