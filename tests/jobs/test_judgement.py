"""Which examples report, before any model is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions, prompt_hash
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.evaluation.subjects import seen_by
from shape_moe.jobs.judgement import JudgementOptions, set_aside
from shape_moe.jobs.judging_examples import unseen_parts
from shape_moe.jobs.planning import plan_search
from shape_moe.jobs.session import ExampleOptions
from shape_moe.progress import SILENT
from support.data import synthetic_trace, write_lines


def source(tmp_path, count: int) -> DataOptions:
    return DataOptions(str(write_lines(tmp_path / f"{count}.jsonl", examples("sorting", count, seed=1))))


def prompts(records) -> set[str]:
    return {prompt_hash(record) for record in records}


def test_calibration_is_the_sample_that_it_would_be_without_a_judgement(tmp_path) -> None:
    data = replace(source(tmp_path, 90), samples=25)
    parts = set_aside(data, JudgementOptions(examples=40), give_up=False)
    assert parts.calibration == load_records(data)
    assert len(parts.report) == 40
    assert not prompts(parts.report) & prompts(parts.calibration)


@pytest.mark.parametrize("give_up", [True, False])
def test_a_search_leaves_examples_to_report_by(embedded, tmp_path, give_up) -> None:
    read = ExampleOptions(replace(source(tmp_path, 60), samples=30))
    plan = plan_search(open_snapshot(embedded), read, None, None, 30, 0, SILENT, JudgementOptions(), give_up=give_up)
    sides = [
        prompts(records) for records in (plan.session.calibrator.records, plan.held_out.records, plan.parts.report)
    ]
    assert [len(side) for side in sides] == ([24, 24, 12] if give_up else [30, 30, 0])
    assert len(set.union(*sides)) == 60
    assert plan.session.source_notes["split_sentence"] == plan.sentence


def test_what_a_trace_has_not_seen_reports(tmp_path) -> None:
    data = source(tmp_path, 30)
    records, trace = load_records(data), synthetic_trace()
    traced = replace(trace, info=replace(trace.info, source={"prompts": [prompt_hash(r) for r in records[:10]]}))
    parts = unseen_parts([data], seen_by(traced, None), records[10:18], JudgementOptions())
    assert prompts(parts.report) == prompts(records[18:])
    nothing_left = unseen_parts([data], seen_by(traced, None), records[10:], JudgementOptions())
    assert nothing_left.report == []
    assert "seen every example" in nothing_left.unmeasured[""]
    unknown = unseen_parts([data], seen_by(None, None), (), JudgementOptions())
    assert unknown.unmeasured == {"": "the trace does not name its prompts"}
    gone = unseen_parts([DataOptions(str(tmp_path / "gone.jsonl"))], seen_by(traced, None), (), JudgementOptions())
    assert "gone.jsonl" in gone.unmeasured[""]


def test_what_cannot_be_asked_of_a_judgement_is_refused() -> None:
    for options, words in (
        ({"max_drop": 0.0}, "--max-drop"),
        ({"require": "good"}, "safe or no-loss"),
        ({"examples": 3}, "at least"),
        ({"answers": 0}, "at least"),
    ):
        with pytest.raises(UsageError, match=words):
            JudgementOptions(**options)
