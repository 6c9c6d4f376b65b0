"""From records to examples: who answers, what is left out, and how often a record is tokenised."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from shape_moe.calibration import example_maker
from shape_moe.calibration.example_maker import ANSWERS_FILE, AnswerOptions, ExampleMaker
from shape_moe.calibration.examples import Tokeniser, TokenOptions
from shape_moe.calibration.records import DataOptions, Record
from shape_moe.calibration.seen_prompts import salted_hash
from shape_moe.errors import DataError
from shape_moe.progress import SILENT

CONTEXT = 24
RECORDS = [
    Record(2, "line 3", prompt="abc"),
    Record(5, "line 6", prompt="de", response="fgh"),
    Record(7, "line 8", text="ijkl"),
    Record(9, "line 10", prompt="m"),
]
NOBODY = pytest.fail  # stands for the model where nothing is to be answered


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """How often each record became an example, by its index."""
    found = Counter()
    real = Tokeniser.example

    def example(self, record, answer=None):
        found[record.index] += 1
        return real(self, record, answer)

    monkeypatch.setattr(Tokeniser, "example", example)
    return found


@pytest.fixture
def calibrator(embedded):
    """One token per character: the embedded model's tokenizer knows bytes."""
    tokeniser = Tokeniser(AutoTokenizer.from_pretrained(embedded), CONTEXT, TokenOptions(template=False))

    def make(records=RECORDS, **options) -> ExampleMaker:
        return ExampleMaker(records, tokeniser, DataOptions("d.jsonl"), AnswerOptions(**options), SILENT)

    return make


def texts(calibrator: ExampleMaker) -> dict[int, tuple[str, str]]:
    """Prompt and response by record index."""
    decode = calibrator.tokeniser.tokenizer.decode
    return {
        e.index: (decode(e.tokens[: e.prompt_length]), decode(e.tokens[e.prompt_length :])) for e in calibrator.examples
    }


def model(answers: dict[int, str]):
    """What stands for the model, as the jobs hand it over."""

    def answer(_tokeniser, records, *, known, keep, **_options):
        found = dict(known) | {r.index: [ord(c) for c in answers[r.index]] for r in records if r.index not in known}
        keep(found)
        return found

    return lambda: answer


def fetched(answers: dict[int, str]):
    """What stands for an endpoint."""
    return lambda _url, records, *, known, **_options: {**{r.index: answers[r.index] for r in records}, **known}


def test_only_answered_records_are_tokenised_again(calibrator, counts) -> None:
    chosen = calibrator()
    assert counts == {2: 1, 5: 1, 7: 1, 9: 1}
    assert chosen.longest() == CONTEXT  # an open prompt and as much answer as fits
    chosen.run(model({2: "xy", 9: "z"}), None)
    assert texts(chosen) == {2: ("abc", "xy"), 5: ("de", "fgh"), 7: ("ijkl", ""), 9: ("m", "z")}
    assert chosen.longest() == 5
    assert counts == {2: 2, 5: 1, 7: 1, 9: 2}


def test_without_answers_nothing_is_tokenised_again(calibrator, counts) -> None:
    chosen = calibrator(max_new_tokens=0)
    assert chosen.longest() == 5
    chosen.run(NOBODY, None)
    assert texts(chosen) == {2: ("abc", ""), 5: ("de", "fgh"), 7: ("ijkl", ""), 9: ("m", "")}
    assert set(counts.values()) == {1}


def test_answers_of_an_endpoint(calibrator, counts, monkeypatch) -> None:
    monkeypatch.setattr(example_maker, "fetch_answers", fetched({2: "xy", 9: "z"}))
    chosen = calibrator(responses_from="http://127.0.0.1:1")
    chosen.run(NOBODY, None)
    assert texts(chosen) == {2: ("abc", "xy"), 5: ("de", "fgh"), 7: ("ijkl", ""), 9: ("m", "z")}
    assert counts == {2: 2, 5: 1, 7: 1, 9: 2}
    assert chosen.source()["answers_from"] == "http://127.0.0.1:1"


def test_empty_answers_of_an_endpoint(calibrator, monkeypatch) -> None:
    monkeypatch.setattr(example_maker, "fetch_answers", fetched({2: "", 9: "z"}))
    with pytest.raises(DataError, match="line 3: the endpoint gave an empty answer"):
        calibrator(responses_from="http://127.0.0.1:1").run(NOBODY, None)
    chosen = calibrator(responses_from="http://127.0.0.1:1", skip_bad=True)
    chosen.run(NOBODY, None)
    assert sorted(texts(chosen)) == [5, 7, 9]
    assert chosen.skipped == {"line 3": "line 3: the endpoint gave an empty answer."}


def test_answers_that_make_a_record_too_long(calibrator, monkeypatch) -> None:
    monkeypatch.setattr(example_maker, "fetch_answers", fetched({2: "x" * CONTEXT, 9: "z"}))
    with pytest.raises(DataError, match=r"line 3: 27 tokens are more than the model's context of 24"):
        calibrator(responses_from="http://127.0.0.1:1").run(NOBODY, None)
    chosen = calibrator(responses_from="http://127.0.0.1:1", skip_bad=True)
    assert [example.index for example in chosen.run(NOBODY, None)] == [5, 7, 9]
    assert list(chosen.skipped) == ["line 3"]


def test_bad_records_are_looked_at_once(calibrator, counts) -> None:
    records = [Record(0, "line 1", text="x" * 30), *RECORDS]
    with pytest.raises(DataError, match="line 1: 30 tokens"):
        calibrator(records)
    counts.clear()
    chosen = calibrator(records, skip_bad=True, max_new_tokens=0)
    assert chosen.longest() == 5
    assert [example.index for example in chosen.run(NOBODY, None)] == [2, 5, 7, 9]
    assert list(chosen.skipped) == ["line 1"]
    assert set(counts.values()) == {1}
    with pytest.raises(DataError, match=r"No record of d\.jsonl could be used"):
        calibrator(records[:1], skip_bad=True).run(NOBODY, None)


def test_token_limits_count_answers(calibrator, counts) -> None:
    chosen = calibrator(max_tokens=10)
    chosen.run(model({2: "xyz", 9: "z"}), None)
    assert sorted(texts(chosen)) == [2, 5]  # 6 and 5 tokens: the second passes 10
    assert counts == {2: 2, 5: 1, 7: 1, 9: 1}


def test_known_answers_are_found_again(calibrator, tmp_path) -> None:
    calibrator().run(model({2: "xy", 9: "z"}), tmp_path)
    assert json.loads((tmp_path / ANSWERS_FILE).read_text()) == {"2": [120, 121], "9": [122]}
    again = calibrator()
    again.run(NOBODY, tmp_path)
    assert texts(again)[2] == ("abc", "xy")


def test_the_source_names_the_prompts_that_were_used(calibrator, monkeypatch) -> None:
    monkeypatch.setattr(example_maker, "fetch_answers", fetched({2: "", 9: "z"}))
    chosen = calibrator(responses_from="http://127.0.0.1:1", skip_bad=True)
    chosen.run(NOBODY, None)
    source = chosen.source()
    assert source["records"] == [5, 7, 9]
    asked = [Record(0, "elsewhere", prompt=text) for text in ("de", "ijkl", "m")]
    assert source["prompts"] == [salted_hash(record, source["salt"]) for record in asked]
