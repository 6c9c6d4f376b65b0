"""The embedded model knows its tasks, and pruning it does what the method promises."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shape_moe.calibration.batches import batches
from shape_moe.calibration.examples import Tokeniser, TokenOptions
from shape_moe.calibration.records import Record
from shape_moe.cli.main import run
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.run import run_demo
from shape_moe.demo.tasks import TASKS, examples
from shape_moe.pruning.masks import masked
from shape_moe.reporting.demo_rows import demo_best, demo_headline
from shape_moe.scoring.registry import scorers
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.controls import inverted_selection, random_selection
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.tracing.trace import Trace, load_trace
from shape_moe.tracing.transformers_model import ModelTracer
from support.data import make_info

SEEDS = range(10)


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return AutoTokenizer.from_pretrained(embedded)


@pytest.fixture(scope="module")
def model(embedded):
    return AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()


def test_it_is_small_and_documented(embedded) -> None:
    assert sum(f.stat().st_size for f in embedded.iterdir()) <= 8_000_000
    text = (embedded / "README.md").read_text()
    assert "scripts/train_demo_model.py" in text
    record = json.loads((embedded / "training.json").read_text())
    assert min(record["exact_match_held_out_percent"].values()) >= 97


def test_it_knows_every_task(embedded, tokenizer) -> None:
    as_shipped = AutoModelForCausalLM.from_pretrained(embedded).eval()
    assert as_shipped.dtype == torch.bfloat16
    scores = exact_match(as_shipped, tokenizer, count=500, seed=77)
    assert scores.keys() == TASKS.keys()
    assert min(scores.values()) >= 0.97, scores


def test_its_tokenizer_is_a_real_one(tokenizer) -> None:
    text = "sort 73=\tGrüße, 世界!\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.pad_token_id == 256


def test_one_pass_judges_as_generation_does(model, tokenizer) -> None:
    """Teacher-forced exact match is greedy generation's, task by task, for a model that makes mistakes."""
    trace = trace_task(model, tokenizer, "addition", 0)
    selection = select_from_trace(trace, SelectOptions(keep=0.4))
    with masked(model, selection):
        quick = exact_match(model, tokenizer, count=20, seed=5)
        for task in TASKS:
            right = 0
            for row in examples(task, 20, seed=5, held_out=True):
                prompt = torch.tensor([tokenizer(row["prompt"]).input_ids])
                output = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False
                )
                right += tokenizer.decode(output[0, prompt.shape[1] :]) == row["response"]
            assert quick[task] == pytest.approx(right / 20), task
    assert 0 < fmean(quick.values()) < 1


def trace_task(model, tokenizer, task: str, seed: int) -> Trace:
    tokeniser = Tokeniser(tokenizer, 512, TokenOptions())
    rows = examples(task, 25, seed=seed)
    calibration = [
        tokeniser.example(Record(i, task, prompt=row["prompt"], response=row["response"])) for i, row in enumerate(rows)
    ]
    tracer = ModelTracer(model)
    tracer.run(batches(calibration, 25, 256))
    return Trace(make_info(tracer, examples=25), tracer.statistics(), tracer.coalitions())


def test_shape_keeps_the_task_and_its_inversion_destroys_it(model, tokenizer, record_property) -> None:
    """25 examples, keep 0.8, ten draws of the calibration set, drop routing."""
    dense = exact_match(model, tokenizer)
    kept: dict[str, list[float]] = {task: [] for task in TASKS}
    inverted: dict[str, list[float]] = {task: [] for task in TASKS}
    for task in TASKS:
        for seed in SEEDS:
            trace = trace_task(model, tokenizer, task, seed)
            selection = select_from_trace(trace, SelectOptions(keep=0.8))
            opposite = inverted_selection(selection, score_trace(trace, "shape"))
            for chosen, results in ((selection, kept), (opposite, inverted)):
                with masked(model, chosen):
                    results[task].append(exact_match(model, tokenizer, [task])[task])
    lost = {task: 100 * (dense[task] - fmean(kept[task])) for task in TASKS}
    left = {task: 100 * fmean(inverted[task]) for task in TASKS}
    record_property("points_lost", lost)
    record_property("left_by_inversion", left)
    print(f"points lost {lost}, mean {fmean(lost.values()):.2f}; left by inversion {left}")
    assert fmean(lost.values()) <= 2
    assert max(lost.values()) <= 8
    assert max(left.values()) <= 40


def test_controls_keep_the_counts(model, tokenizer) -> None:
    trace = trace_task(model, tokenizer, "sorting", 0)
    selection = select_from_trace(trace, SelectOptions(keep=0.6))
    scores = score_trace(trace, "shape")
    opposite = inverted_selection(selection, scores)
    for other in (opposite, random_selection(selection, 0)):
        assert [len(ids) for ids in other.layers.values()] == [len(ids) for ids in selection.layers.values()]
    for row, layer in enumerate(trace.info.layers):
        dropped = sorted(set(range(32)) - set(opposite.layers[layer]))
        assert scores.values[row][dropped].min() >= scores.values[row][opposite.layers[layer]].max()
    assert random_selection(selection, 0) == random_selection(selection, 0)
    assert random_selection(selection, 0) != random_selection(selection, 1)


def test_the_demo_prunes_by_every_scorer(tmp_path) -> None:
    made = run_demo("sorting", keep_rates=(0.4,), folder=tmp_path)
    rows = made.rows
    assert rows[0].scorer == "dense"
    assert {row.scorer for row in rows} == {"dense", "shape, inverted", *scorers()}
    by_name = {row.scorer: row for row in rows}
    assert by_name["dense"].on_task == 1
    assert by_name["contribution"].on_task > by_name["random"].on_task
    assert by_name["contribution"].on_task > by_name["shape, inverted"].on_task
    assert all(row.size < 0.5 * rows[0].size for row in rows[1:])
    for folder in tmp_path.glob("sorting-*-0.4"):
        assert (folder / "model.safetensors").stat().st_size < 0.5 * rows[0].size
    assert made.report == tmp_path / "report.html"
    page = made.report.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    page = page[: page.index("plotly.js v")]
    best = demo_best(made.document)
    assert by_name[best.row["scorer"]].on_task >= 0.98
    assert f"{demo_headline(made.document)}." in page
    assert f"% smaller ({best.sizes}), and the embedded model (4 layers of 32 experts) still does sorting" in page
    assert f"Method: {best.row['scorer']}/coverage, drop, ragged, 25 calibration examples (not the published" in page
    assert str(tmp_path / "sorting.jsonl") in page
    assert ".partial" not in page
    assert (tmp_path / "sorting.jsonl").is_file()
    assert load_trace(tmp_path / "sorting-trace").info.examples == 25


def test_the_demo_names_its_report(tmp_path, capsys, monkeypatch) -> None:
    job = ["demo", "--keep", "0.8", "-o", str(tmp_path / "d")]
    monkeypatch.setattr("shape_moe.demo.run.scorers", lambda: {"frequency": None})
    assert run(job) == 0
    assert str(tmp_path / "d" / "report.html") in capsys.readouterr().out
    assert run([*job, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(tmp_path / "d" / "report.html")
    assert (tmp_path / "d" / "demo.json").is_file()


def test_the_demo_shows_a_table(capsys) -> None:
    assert run(["demo", "--task", "words", "--keep", "0.8", "--rule", "uniform", "--all"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The embedded model (4 layers of 32 experts) traced on words, rule uniform" in out
    for word in ("dense", "shape, inverted", "random", "contribution", "MiB", "other tasks"):
        assert word in out


def test_the_demo_ends_in_ten_lines_and_recommends_what_it_shows(capsys, monkeypatch) -> None:
    monkeypatch.setattr("shape_moe.demo.run.scorers", lambda: {"shape": None, "contribution": None})
    assert run(["demo", "--task", "addition", "--keep", "0.6", "--keep", "0.4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    assert lines[1].split()[:4] == ["dense", "model", "100", "%"]
    headline = next(line for line in lines if "% smaller (" in line)
    assert "the embedded model (4 layers of 32 experts) still does addition" in headline
    assert headline.endswith("by the scorer contribution.")  # the published one keeps four fifths of the task here
    assert "--scorer contribution" in lines[-1]
