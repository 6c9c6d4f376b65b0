"""The first screen: how much smaller, what it cost, the verdict, what to do next, and what nobody must miss."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from shape_moe.evaluation.evaluated import read_evaluation
from shape_moe.evaluation.falls import Outcome, Pairs
from shape_moe.evaluation.intervals import Estimate
from shape_moe.evaluation.measures import Health
from shape_moe.evaluation.swept import read_sweep
from shape_moe.evaluation.verdict import Verdict, Word, decide
from shape_moe.reporting.html import render_report
from shape_moe.reporting.material import Material, Sizes
from shape_moe.reporting.story import COST_HEADINGS, stories
from shape_moe.reporting.summary import warnings
from shape_moe.selection.select import SelectOptions, select_from_trace
from support.data import routing_trace
from support.results import write_evaluation, write_sweep


def judged(**lost: int) -> Verdict:
    """Classes of 100 examples that the dense model had all right, by how many the pruned one has wrong."""
    return decide([Outcome(name, 100, Pairs(100, 100, count, 0), kl=0.0004 + count) for name, count in lost.items()])


@pytest.fixture
def material() -> Material:
    selection = select_from_trace(routing_trace(model="org/name"), SelectOptions(keep=0.5))
    return Material("./out", selection, sizes=Sizes(8 * 2**30, 5 * 2**30, "measured"), checkpoint=True)


def page(material: Material) -> str:
    """The words before the first plot."""
    text, _ = render_report(material)
    words = re.sub(r"<[^>]*>", " ", text[text.index("<h1>") : text.index("<nav")])
    return " ".join(words.split())


def test_the_worst_class_comes_first_with_its_bound(material) -> None:
    (story,) = stories(replace(material, verdict=judged(easy=0, hard=40, middling=3)))
    assert story.smaller == "38 % smaller"
    assert story.detail == (
        "org/name (4 layers of 16 experts): 38 % smaller, from 8.00 GiB to 5.00 GiB; 32 of 64 experts kept."
    )
    assert story.headings == COST_HEADINGS
    assert [row[0] for row in story.costs] == ["hard: exact match", "middling: exact match", "easy: exact match"]
    assert story.costs[0][1:4] == ("100 %", "60 %", "40 %")
    assert story.costs[2][3] == "0 %"
    assert story.costs[2][5:] == ("< 0.001", "100")
    assert (story.word, story.tone) == ("damaged", "bad")
    assert "hard" in story.reason
    (again,) = story.commands
    assert again.startswith("shape-moe prune org/name --data TASK.jsonl --keep 0.6 --method 'shape/coverage, drop' -o ")


def test_a_verdict_without_loss_tells_how_to_make_it_surer(material) -> None:
    (story,) = stories(replace(material, verdict=judged(one=0)))
    assert (story.word, story.tone) == ("no loss seen", "fair")
    assert "is not excluded" in story.reason
    assert story.commands == ("shape-moe evaluate org/name ./out --data HELD_OUT.jsonl -o evaluation.json",)
    (silent,) = stories(material)
    assert (silent.word, silent.costs) == ("not measured", ())


def test_the_order_of_the_first_screen(material) -> None:
    text = page(replace(material, verdict=judged(hard=40, easy=0)))
    found = [
        text.index(part)
        for part in (
            "org/name with 50 % of its experts",
            "Method: shape/coverage, drop, ragged",
            "How much smaller",
            "What it cost",
            "hard: exact match",
            "easy: exact match",
            "Verdict",
            "Damaged",
            "What to do next",
            "shape-moe prune org/name",
        )
    ]
    assert found == sorted(found)


def test_complaints_of_any_set_are_on_the_first_screen(tmp_path) -> None:
    evaluation = read_evaluation(write_evaluation(tmp_path, also="general.jsonl"))
    model = evaluation.models[1]
    ill = Health({}, {}, 64, ("17 % of the answers do not end (dense model: 0 %)",))
    sets = {**model.sets, "also": replace(model.sets["also"], health=ill)}
    evaluation = replace(evaluation, models=(evaluation.models[0], replace(model, sets=sets)))
    said = f"{model.name}, {evaluation.also}: 17 % of the answers do not end (dense model: 0 %)."
    assert warnings(Material("e.json", evaluation=evaluation))[0] == said
    assert evaluation.to_document()["warnings"][0] == said
    assert said in page(Material("e.json", evaluation=evaluation))
    noted = replace(evaluation, notes=(said,))
    assert warnings(Material("e.json", evaluation=noted)).count(said) == 1


def test_a_loss_on_other_data_is_on_the_first_screen(tmp_path) -> None:
    evaluation = read_evaluation(write_evaluation(tmp_path, also="general.jsonl"))
    model = evaluation.models[1]
    change = {"exact_match": Estimate(-0.6, -0.7, -0.5)}
    sets = {**model.sets, "also": replace(model.sets["also"], change=change, health=None)}
    evaluation = replace(evaluation, models=(evaluation.models[0], replace(model, sets=sets)))
    (said,) = [text for text in warnings(Material("e.json", evaluation=evaluation)) if "fall" in text]
    assert said == f"{model.name} on {evaluation.also}: right answers fall by 50 % to 70 % (95 % interval)."


def test_a_sweep_alone_recommends_and_does_not_judge(tmp_path) -> None:
    sweep = read_sweep(write_sweep(tmp_path))
    (story,) = stories(Material(str(tmp_path), sweep=sweep))
    assert story.word == str(Word.NOT_MEASURED)
    assert story.commands[0].startswith("shape-moe prune Qwen/Qwen3-30B-A3B --selection ")
    (nothing,) = stories(Material(str(tmp_path), sweep=replace(sweep, recommended=None)))
    assert nothing.smaller == "Nothing recommended"
