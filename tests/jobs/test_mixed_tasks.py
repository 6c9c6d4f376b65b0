"""Two tasks in one file: no task is paid for with the other, or the command says which one was lost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from shape_moe.calibration.records import DataOptions
from shape_moe.cli.main import run
from shape_moe.demo.tasks import examples
from shape_moe.evaluation.verdict import Word, decide
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.pruning.masks import masked
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import load_trace
from support.data import write_lines

EACH, ENOUGH = 25, 0.9


@torch.no_grad()
def matched(model, tokenizer, task: str, seed: int) -> int:
    """Of 60 unseen examples of a task, how many are answered word for word."""
    found = 0
    for row in examples(task, 60, seed=1000 + seed, held_out=True):
        prompt, answer = (tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "response"))
        best = model(torch.tensor([prompt + answer])).logits[0].argmax(-1)
        found += best[len(prompt) - 1 : -1].tolist() == answer
    return found


def mixed(folder, tasks: tuple[str, ...], seed: int) -> str:
    rows = [row for pair in zip(*(examples(task, EACH, seed=seed) for task in tasks), strict=True) for row in pair]
    return str(write_lines(folder / f"{'-'.join(tasks)}-{seed}.jsonl", rows))


def asked(data: str, *, pool: bool) -> PruneOptions:
    return PruneOptions(
        select=SelectOptions(0.6, scoring=ScoreOptions(pool_classes=pool)),
        trace=ExampleOptions(DataOptions(data, samples=EACH), device="cpu", dtype="float32"),
        device="cpu",
        dtype="float32",
        judgement=JudgementOptions(general=False),
        check_logits=False,
    )


def lost_tasks(embedded_model, selection: Selection, tasks: tuple[str, ...], seed: int) -> list[str]:
    """The tasks of which less than nine tenths of what the dense model knows are left."""
    model, tokenizer = embedded_model
    dense = {task: matched(model, tokenizer, task, seed) for task in tasks}
    with masked(model, selection):
        return [task for task in tasks if matched(model, tokenizer, task, seed) < ENOUGH * dense[task]]


@pytest.mark.parametrize(("tasks", "seed"), [(("addition", "sorting"), 0), (("sorting", "lookup"), 1)])
def test_no_task_is_lost_without_a_word(embedded, embedded_model, tmp_path, tasks, seed) -> None:
    result = prune(embedded, tmp_path / "out", asked(mixed(tmp_path, tasks, seed), pool=False))
    assert result.selection.classes == tuple(sorted(tasks))
    assert not result.selection.pooled
    assert load_trace(result.path / "shape" / "trace").info.classes == tuple(sorted(tasks))
    lost = lost_tasks(embedded_model, result.selection, tasks, seed)
    verdict = result.judgement.verdict
    assert lost == [tasks[0] if tasks[0] == "addition" else tasks[1]], "the published values are not enough here"
    assert list(verdict.suspects) == lost
    assert lost[0] in verdict.headline.lower()
    assert verdict.headline in (result.path / "README.md").read_text()


def test_the_published_method_adds_tasks_up_and_names_what_is_lost(embedded, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("shape_moe.jobs.judgement.general_records", lambda *_: [])
    data = mixed(tmp_path, ("sorting", "lookup"), 1)
    result = prune(embedded, tmp_path / "out", asked(data, pool=True))
    assert result.selection.pooled
    assert result.selection.classes == ("lookup", "sorting")
    (note,) = [line for line in result.judgement.lines() if "added up, as published" in line]
    assert note.startswith("Lost most: lookup.")
    assert note in (result.path / "README.md").read_text()
    flags = ["--keep", "0.6", "--no-judge", "--no-logits", "--device", "cpu", "--json"]
    out = tmp_path / "paper"
    assert run(["prune", str(embedded), "--data", data, "--preset", "paper", *flags, "-o", str(out)]) == 0
    chosen = json.loads((out / "shape" / "selection.json").read_text())
    assert chosen["constraints"]["classes"] == {"names": ["lookup", "sorting"], "joined": "pooled"}
    assert "Classes by field 'task': lookup 1" in " ".join(capsys.readouterr().err.split())


def test_files_are_classes_as_fields_are(embedded, tmp_path) -> None:
    files = [str(write_lines(tmp_path / f"{t}.jsonl", examples(t, EACH, seed=3))) for t in ("reversal", "words")]
    options = asked(files[0], pool=False)
    data = replace(options.trace.data, also=(files[1],), samples=2 * EACH)
    options = replace(options, trace=replace(options.trace, data=data), judgement=None)
    result = prune(embedded, tmp_path / "out", options)
    assert result.selection.classes == ("reversal", "words")


@pytest.mark.parametrize("stream", [False, True])
def test_a_class_that_lost_a_tenth_is_named_before_exact_match_shows_it(embedded, tmp_path, stream) -> None:
    """The look-ups lost 15 % on 200 others; of the 14 that report, exact match alone would name none."""
    rows = [row for task in ("reversal", "lookup") for row in examples(task, EACH, seed=2)]
    options = replace(asked(str(write_lines(tmp_path / "mixed.jsonl", rows)), pool=False), stream=stream)
    result = prune(embedded, tmp_path / "out", options)
    verdict = result.judgement.verdict
    assert verdict.suspects == ("lookup",)
    assert verdict.reason.startswith("Class lookup may be damaged: its right answers have a probability of ")
    assert "(25 examples, 11 of them calibrated with)" in verdict.reason
    assert verdict.word is Word.LOSS
    assert verdict.headline in (result.path / "README.md").read_text()
    alone = [replace(outcome, likelihood=None) for outcome in verdict.outcomes]
    assert decide(alone).suspects == ()
