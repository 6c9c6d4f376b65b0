"""A grid end to end on the embedded model: interrupted, resumed, and equal to what evaluate says of one cell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import shape_moe
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.evaluation import harness
from shape_moe.evaluation.bench import Bench
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.experiments import grid as grid_module
from shape_moe.experiments import plan
from shape_moe.experiments.evaluations import JudgedTask
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.tracing.trace import load_trace
from support.data import write_lines
from support.harness_tasks import write_tasks

CALIBRATE, JUDGE = 6, 8


def write_rows(file: Path, rows) -> str:
    return str(write_lines(file, rows))


class _StoppedError(Exception):
    """Stands for whatever stops a run."""


@pytest.fixture
def counted(monkeypatch):
    """Count the selections that are judged; stop before one of them."""
    made = {"judged": [], "stop_at": None}

    def counting(kind):
        original = kind.document

        def judge(self, selection):
            if made["stop_at"] == len(made["judged"]):
                made["stop_at"] = None
                raise _StoppedError
            made["judged"].append(selection.digest)
            return original(self, selection)

        monkeypatch.setattr(kind, "document", judge)

    counting(Bench)
    counting(JudgedTask)
    return made


@pytest.fixture
def grid(tmp_path):
    """Two tasks and three selections each, on one keep rate."""
    for task in ("addition", "sorting"):
        write_rows(tmp_path / f"{task}.jsonl", examples(task, CALIBRATE + JUDGE, seed=5, held_out=True))
    content = {
        "models": [{"model": "embedded", "name": "tiny", "device": "cpu", "dtype": "float32"}],
        "calibration": {
            "addition": {"data": "addition.jsonl", "samples": CALIBRATE},
            "sorting": {"data": "sorting.jsonl", "samples": CALIBRATE},
        },
        "methods": ["shape/coverage", "random/uniform"],
        "random_seeds": [0, 1],
        "keep": [0.5],
        "evaluation": {
            "sums": {
                "data": "addition.jsonl",
                "generate": 2,
                "answer_tokens": 6,
                "metrics": ["exact_match", "generated_exact_match", "kl"],
            },
            "sorts": {"data": "sorting.jsonl", "calibration": ["sorting"]},
        },
        "seed": 2,
        "output": "results",
    }
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_an_interrupted_grid_goes_on_and_its_figures_are_those_of_evaluate(grid, tmp_path, counted, embedded):
    counted["stop_at"] = 2
    with pytest.raises(_StoppedError):
        shape_moe.experiment(grid)
    partial = tmp_path / "results.partial"
    assert len((partial / "cells.jsonl").read_text().splitlines()) == 1 + 2  # the dense model, and two cells
    with (partial / "cells.jsonl").open("a") as stream:
        stream.write('{"cell": ["tiny", "su')  # cut short
    stamps = {file: file.stat().st_mtime_ns for file in partial.glob("traces/tiny/*/trace.json")}
    assert len(stamps) == 2

    result = shape_moe.experiment(grid)

    # random selections are the same for both calibration tasks, and judged once
    assert len(counted["judged"]) == (2 + 2) + (1 + 2)
    assert len({*counted["judged"]}) == 4
    folder = tmp_path / "results"
    for file, stamp in stamps.items():
        assert (folder / file.relative_to(partial)).stat().st_mtime_ns == stamp
    assert not partial.exists()
    assert sorted(path.name for path in folder.iterdir()) == [
        "experiment.json",
        "experiment.md",
        "selections",
        "traces",
    ]
    _check_document(result.document, folder)
    _check_against_evaluate(result.document, folder, tmp_path, embedded)
    with pytest.raises(UsageError, match="exists and is not empty"):
        shape_moe.experiment(grid)


def _check_document(document, folder):
    assert json.loads((folder / "experiment.json").read_text()) == json.loads(json.dumps(document))
    assert len(document["cells"]) == 6
    for cell in document["cells"]:
        assert set(cell["sets"]) == ({"sums"} if cell["calibration"] == "addition" else {"sums", "sorts"})
        assert abs(cell["keep"] - 0.5) < 0.01
        assert cell["bytes"] < document["dense"][0]["bytes"]
        chosen = shape_moe.load_selection(folder / cell["selection"])
        assert (chosen.scorer, chosen.rule, chosen.kept) == (cell["scorer"], cell["rule"], cell["kept"])
    dense = document["dense"][0]["sets"]
    assert (dense["sums"]["examples"], dense["sums"]["generated"], dense["sorts"]["generated"]) == (JUDGE, 2, 0)
    by_task = {entry["name"]: entry for entry in document["evaluation"]}
    assert f"{CALIBRATE} records were left out" in by_task["sums"]["sentence"]
    text = (folder / "experiment.md").read_text()
    assert "| random/uniform, mean of 2 seeds |" in text
    assert "calibrated on sorting, routing drop" in text


def _check_against_evaluate(document, folder, tmp_path, embedded):
    """One cell, judged anew by evaluate over the examples that the calibration trace does not know."""
    trace = load_trace(folder / "traces" / "tiny" / "addition")
    source = DataOptions(str(tmp_path / "addition.jsonl"), samples=CALIBRATE, seed=2)
    seen = {record.prompt for record in load_records(source)}
    assert trace.info.examples == len(seen) == CALIBRATE
    fresh = [row for row in examples("addition", CALIBRATE + JUDGE, seed=5, held_out=True) if row["prompt"] not in seen]
    file = write_rows(tmp_path / "fresh.jsonl", fresh)
    cell = next(c for c in document["cells"] if (c["scorer"], c["calibration"]) == ("shape", "addition"))
    again = shape_moe.evaluate(
        embedded,
        [folder / cell["selection"]],
        data=ExampleOptions(DataOptions(file, seed=2), device="cpu", dtype="float32"),
        options=EvaluateOptions(generation=GenerationOptions(2, 6), footprint=None, general=False, seed=2),
    )
    for ours, theirs in zip([document["dense"][0], cell], again.document["models"], strict=True):
        for part in ("quality", "change", "generation"):
            assert json.loads(json.dumps(ours["sets"]["sums"][part])) == json.loads(
                json.dumps(theirs["sets"]["task"][part])
            )
    assert cell["bytes"] == again.document["models"][1]["bytes"]


def test_another_grid_does_not_go_on_from_this_ones_work(grid, counted):
    counted["stop_at"] = 0
    with pytest.raises(_StoppedError):
        shape_moe.experiment(grid)
    grid.write_text(grid.read_text().replace("seed: 2", "seed: 3"))
    with pytest.raises(UsageError, match="unfinished work of another job"):
        shape_moe.experiment(grid)


def test_a_task_of_lm_eval_is_paired_with_the_dense_model_of_an_earlier_run(tmp_path, task_grid, counted, monkeypatch):
    grid = task_grid({"keep": [0.6, 0.3, 0.01], "routings": ["reroute"]}, fewshot=0)
    counted["stop_at"] = 1
    with pytest.raises(_StoppedError):
        shape_moe.experiment(grid, tmp_path / "out")
    runs = []
    run = JudgedTask._run
    monkeypatch.setattr(JudgedTask, "_run", lambda self: runs.append(self) or run(self))
    document = shape_moe.experiment(grid, tmp_path / "out").document

    assert len(runs) == 1  # the second selection alone: the dense model and the first are known
    dense = document["dense"][0]["sets"]["choice"]
    assert dense["items"] == {"embedded_choice": 4}
    assert "results" not in dense
    possible, impossible = document["cells"][:2], document["cells"][2]
    for cell in possible:
        figures = cell["sets"]["choice"]
        change = figures["change"]["embedded_choice"]["acc"]["value"]
        values = [entry["tasks"]["embedded_choice"]["acc"]["value"] for entry in (figures, dense)]
        assert change == pytest.approx(values[0] - values[1])
    assert impossible["selection"] is None
    assert "keep 0.01" in impossible["reason"]
    assert "not possible" in (tmp_path / "out" / "experiment.md").read_text()


def test_nothing_is_loaded_when_a_record_is_too_long_for_the_model(grid, monkeypatch):
    def loaded(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("shape_moe.experiments.grid.load_original", loaded)
    monkeypatch.setattr(grid_module, "held_out_set", loaded)
    rows = [{"prompt": "p", "response": "x" * 5000}, *examples("addition", CALIBRATE, seed=1)]
    write_rows(grid.parent / "addition.jsonl", rows)
    with pytest.raises(shape_moe.errors.DataError, match="addition.jsonl, line 1"):
        shape_moe.experiment(grid)
    assert not (grid.parent / "results.partial").exists()


@pytest.fixture
def task_grid(tmp_path):
    """One selection, judged by one task of lm-eval; further options are those of the task."""
    pytest.importorskip("lm_eval")
    write_rows(tmp_path / "words.jsonl", examples("words", CALIBRATE, seed=5))
    write_tasks(tmp_path / "tasks")
    content = {
        "models": [{"model": "embedded", "device": "cpu", "dtype": "float32"}],
        "calibration": {"words": {"data": "words.jsonl"}},
        "scorers": ["frequency"],
        "keep": [0.6],
        "evaluation": {"choice": {"task": "tasks/choice.yaml", "limit": 4}},
    }

    def write(changes=(), model="embedded", **options):
        content.update(changes)
        content["models"][0]["model"] = str(model)
        content["evaluation"]["choice"] |= options
        file = tmp_path / "grid.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def test_the_hash_of_the_results_is_that_of_the_job_as_it_began(task_grid, tmp_path, monkeypatch):
    hashed, run, original = [], JudgedTask._run, plan.content_hash
    monkeypatch.setattr(plan, "content_hash", lambda records: hashed.append(records) or original(records))
    task, digests = tmp_path / "tasks" / "choice.yaml", set()

    def edited(self):
        task.write_text(task.read_text() + "# a note\n")
        digests.add(json.loads((tmp_path / "out.partial" / "job.json").read_text())["digest"])
        return run(self)

    monkeypatch.setattr(JudgedTask, "_run", edited)
    document = shape_moe.experiment(task_grid(), tmp_path / "out").document
    assert digests == {document["config_hash"]}
    assert len(hashed) == 1  # records are hashed once, for the job and for the document
    assert document["calibration"][0]["content_hash"] == original(hashed[0])


def test_nothing_is_loaded_when_a_task_cannot_be_run(task_grid, tmp_path, monkeypatch, embedded):
    def loaded(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("shape_moe.experiments.grid.load_original", loaded)
    bare = shutil.copytree(embedded, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    with pytest.raises(UsageError, match="the tokenizer has none"):
        shape_moe.experiment(task_grid(model=bare, chat_template=True), tmp_path / "out")
    with pytest.raises(UsageError, match="There is no task 'embedded_chioce'"):
        shape_moe.experiment(task_grid(task="embedded_chioce"), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_nothing_is_read_when_lm_eval_is_missing(task_grid, tmp_path, monkeypatch):
    grid = task_grid()
    (tmp_path / "words.jsonl").write_text("no JSON")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="lm-evaluation-harness is not installed"):
        shape_moe.experiment(grid, tmp_path / "out")
