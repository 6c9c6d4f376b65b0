"""How long judging takes: the estimate against what was done, by a clock that counts the model's work."""

from __future__ import annotations

import re

import pytest

from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.parts import three_parts
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import UsageError
from shape_moe.evaluation import questions
from shape_moe.evaluation.forgotten import general_records
from shape_moe.evaluation.judging_time import Amounts, amounts_within
from shape_moe.jobs import judgement, judging_plan
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.judgement import JudgementOptions, judge_selection
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.progress import Silent
from shape_moe.selection.selection import Selection
from support.data import write_lines

FEW_GENERAL = 22


class Said(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def few_prompts(monkeypatch):
    """Two general prompts of each kind."""
    groups = sorted({record.group for record in general_records()})
    records = [record for group in groups for record in general_records([group])[:2]]
    assert len(records) == FEW_GENERAL
    for module in (questions, judgement):
        monkeypatch.setattr(module, "general_records", lambda: records)


class Clock:
    """Time that passes with the model's work: so much for every call, and for every token."""

    def __init__(self, model, call: float, token: float) -> None:
        self.now, self.call, self.token = 0.0, call, token
        model.register_forward_hook(self._work, with_kwargs=True)

    def _work(self, model, args, kwargs, output) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.now += self.call + self.token * ids.numel()

    def __call__(self) -> float:
        return self.now


def cut(keep: int) -> Selection:
    return Selection(
        None, None, None, "hand", "hand", "drop", 32, 4, {i: list(range(keep)) for i in range(4)}, keep / 32
    )


def judged(embedded, tmp_path, monkeypatch, rows, options, speed=(0.05, 0.002), answers=None, keep=24):
    """The judgement, what was said, and the seconds that it took by the clock after they were said."""
    data = DataOptions(str(write_lines(tmp_path / "rows.jsonl", rows)))
    said = Said()
    read = ExampleOptions(data, answers=answers or AnswerOptions(), device="cpu", dtype="float32")
    records = load_records(data)
    session = ModelSession.open(embedded, read, None, said, records)
    clock = Clock(session.model, *speed)
    monkeypatch.setattr(judging_plan, "clock", clock)
    parts = three_parts([], records, calibration=0, give_up=False)
    begun: list[float] = []
    monkeypatch.setattr(said, "note", lambda text: (begun.append(clock.now), Said.note(said, text))[0])
    found = judge_selection(session, parts, data, cut(keep), options)
    place = next(i for i, text in enumerate(said.notes) if "Judging the dense and the pruned model" in text)
    return found, said.notes[place], clock.now - begun[place]


def seconds_in(sentence: str) -> float:
    said = sentence.rpartition("Judging the dense and the pruned model")[2]
    value, unit = re.search(r"takes about ([\d.]+) (s|min)\b", said).groups()
    return float(value) * {"s": 1, "min": 60}[unit]


@pytest.mark.parametrize("speed", [(0.05, 0.0), (0.0, 0.01), (0.02, 0.002)])
def test_the_time_is_right_within_a_factor_of_two(embedded, tmp_path, monkeypatch, few_prompts, speed) -> None:
    rows = [row for task in ("sorting", "addition") for row in examples(task, 24, seed=2)]
    _, sentence, took = judged(embedded, tmp_path, monkeypatch, rows, JudgementOptions(minutes=None), speed)
    assert sentence.startswith(
        "Judging the dense and the pruned model: 48 examples, up to 32 free answers and 22 general prompts"
    )
    assert took / 2 < seconds_in(sentence) < 2 * took


def test_answers_that_are_still_to_be_written_count(embedded, tmp_path, monkeypatch, few_prompts) -> None:
    rows = [{"prompt": row["prompt"]} for row in examples("sorting", 40, seed=2)]
    options = JudgementOptions(minutes=None, general=False)
    limits = AnswerOptions(max_new_tokens=16)
    _, sentence, took = judged(embedded, tmp_path, monkeypatch, rows, options, answers=limits)
    assert took / 2 < seconds_in(sentence) < 2 * took


def test_what_would_take_too_long_is_judged_by_less_and_that_is_said(
    embedded, tmp_path, monkeypatch, few_prompts
) -> None:
    rows = [dict(row, task=task) for task in ("sorting", "addition") for row in examples(task, 60, seed=2)]
    found, sentence, took = judged(embedded, tmp_path, monkeypatch, rows, JudgementOptions(minutes=0.5))
    assert sentence.startswith("Judging everything would take about ")
    assert "to stay within 0.5 min (--judge-minutes), only " in sentence
    assert took < 2 * 30
    count = sum(outcome.examples for outcome in found.verdict.outcomes)
    assert f"only {count} of 120 examples" in sentence
    assert count < 120
    assert 16 <= found.verdict.answers.count <= 32
    note = next(line for line in found.lines() if line.startswith("Judging everything would take"))
    assert note in sentence


def test_the_least_is_done_whatever_it_takes() -> None:
    full, least = Amounts(400, 32, 0, 200), Amounts(16, 16, 8, 22)

    def seconds(amounts: Amounts) -> float:
        return amounts.examples + amounts.answers + amounts.calls + amounts.general

    assert amounts_within(full, least, None, seconds) == (full, 632)
    assert amounts_within(full, least, 1.0, seconds)[0] == Amounts(16, 16, 0, 22)
    amounts, took = amounts_within(full, least, 320.0, seconds)
    assert 250 < took <= 320
    assert amounts.examples / 400 == pytest.approx(amounts.general / 200, abs=0.01)
    assert amounts_within(Amounts(5, 3), least, 1.0, seconds)[0] == Amounts(5, 3)


def test_only_a_time_above_nothing_can_be_given() -> None:
    for options in (JudgementOptions, EvaluateOptions):
        with pytest.raises(UsageError, match="--judge-minutes must be above 0, not 0"):
            options(minutes=0)
