"""General prompts that calibrate as well: a class of their own, answered by the model, and no independent judge."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.responses import generate_answers
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.cli.main import run
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.evaluation import questions
from shape_moe.evaluation.forgotten import general_records, group_names, kept_groups
from shape_moe.jobs.keep_also import FIRST_INDEX, with_general
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.progress import SILENT
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.trace import load_trace
from support.data import write_lines

ANSWERS = AnswerOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = write_lines(tmp_path_factory.mktemp("data") / "sorting.jsonl", examples("sorting", 40, seed=1))
    return DataOptions(str(file), samples=20)


def test_groups_come_first_and_every_class_has_a_name(data) -> None:
    records = load_records(data)
    found = with_general(records, ["JSON"], data)
    general = general_records(["json"])
    assert [record.prompt for record in found] == [record.prompt for record in (*general, *records)]
    assert {record.group for record in found[: len(general)]} == {"general json"}
    assert {record.group for record in found[len(general) :]} == {"sorting"}
    assert min(record.index for record in found[: len(general)]) == FIRST_INDEX
    assert [record.index for record in found[len(general) :]] == [record.index for record in records]
    assert with_general(records, [], data) == records
    stratified = with_general([replace(r, group="ab"[i % 2]) for i, r in enumerate(records)], ["json"], data)
    assert {record.group for record in stratified} == {"general json", "a", "b"}


def test_groups_are_named_as_people_name_them() -> None:
    assert group_names(["Code", "languages", "code"]) == ("code", "german", "french", "spanish", "chinese", "japanese")
    with pytest.raises(UsageError, match="no group 'klingon'.*arithmetic, code.* and languages"):
        ExampleOptions(DataOptions("x"), keep_also=("klingon",))


def test_a_group_counts_as_seen_with_half_of_its_prompts() -> None:
    records = general_records(["code"])
    half = (len(records) + 1) // 2
    assert kept_groups(SeenPrompts.of_records(records[:half])) == {"code"}
    assert kept_groups(SeenPrompts.of_records(records[: half - 1])) == frozenset()


def test_a_group_is_traced_as_a_class_with_the_models_own_answers(embedded, data) -> None:
    options = ExampleOptions(data, answers=ANSWERS, device="cpu", dtype="float32", keep_also=("arithmetic",))
    session = ModelSession.open(embedded, options, None, SILENT)
    traced = session.trace(None)
    assert traced.info.classes == ("general arithmetic", "sorting")
    made = [example for example in session.calibrator.examples if example.group == "general arithmetic"]
    asked = general_records(["arithmetic"])
    expected = generate_answers(
        session.model, session.calibrator.tokeniser, asked, max_new_tokens=6, batch_size=ANSWERS.batch_size
    )
    assert [list(example.response) for example in made] == [expected[record.index] for record in asked]
    alone = ModelSession.open(embedded, ExampleOptions(data, device="cpu", dtype="float32"), None, SILENT)
    assert [e.tokens for e in session.calibrator.examples if e.group == "sorting"] == [
        example.tokens for example in alone.calibrator.run(alone.answerer, None)
    ]


def test_the_table_says_that_a_group_was_calibrated_with(embedded, data, tmp_path, monkeypatch) -> None:
    shown = [*general_records(["arithmetic"])[:3], *general_records(["code"])[:3]]
    monkeypatch.setattr(questions, "general_records", lambda: shown)
    reading = ExampleOptions(data, answers=ANSWERS, keep_also=("arithmetic",))
    options = PruneOptions(SelectOptions(0.7), reading, device="cpu", check_logits=False)
    found = prune(embedded, tmp_path / "out", options, data=reading).judgement
    assert {group.name: group.kept for group in found.forgotten.groups} == {"arithmetic": True, "code": False}
    line = next(line for line in found.lines() if line.startswith("Off the task"))
    assert line.count("calibrated with, so no independent judgement") == 1
    assert [outcome.examples for outcome in found.verdict.outcomes] == [20]  # of the file; no general prompts
    assert load_trace(tmp_path / "out" / "shape" / "trace").info.classes == ("general arithmetic", "sorting")


def test_a_finished_trace_takes_no_groups(embedded, tmp_path, capsys) -> None:
    arguments = ["prune", str(embedded), "--keep", "0.9", "--trace", str(tmp_path), "-o", str(tmp_path / "out")]
    assert run([*arguments, "--keep-also", "code"]) == 2
    assert "--keep-also has no effect on a finished trace" in capsys.readouterr().err
    assert run(["trace", str(embedded), "--data", "x", "-o", str(tmp_path / "t"), "--keep-also", "klingon"]) == 2
    assert "no group 'klingon'" in capsys.readouterr().err
