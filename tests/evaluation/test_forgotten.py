from __future__ import annotations

import json
import unicodedata
from collections import Counter

import pytest

from shape_moe.calibration.examples import Tokeniser, TokenOptions
from shape_moe.calibration.records import prompt_hash
from shape_moe.errors import UsageError
from shape_moe.evaluation.forgotten import Answered, Forgotten, GeneralCheck, by_group, general_records, prompts
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection


def test_there_are_about_two_hundred_prompts_of_every_kind() -> None:
    records = general_records()
    assert 180 <= len(records) <= 220
    assert len({prompt_hash(record) for record in records}) == len(records)
    counts = Counter(record.group for record in records)
    languages = {"german", "french", "spanish", "chinese", "japanese"}
    assert set(counts) == {"arithmetic", "code", "json", *languages, "refusals", "small-talk", "knowledge"}
    assert min(counts.values()) >= 16
    for texts in prompts().values():
        for text in texts:
            assert text == unicodedata.normalize("NFC", text.strip())
            assert len(text) <= 100


def test_groups_can_be_taken_alone() -> None:
    assert {record.group for record in general_records(["code", "json"])} == {"code", "json"}
    with pytest.raises(UsageError, match="no group 'klingon'"):
        general_records(["klingon"])


def test_groups_are_summed_up_over_their_tokens_and_the_worst_comes_first() -> None:
    answered = [Answered(f"p{i}", f"d{i}", f"q{i}") for i in range(4)]
    found = by_group(["a", "b", "a", "b"], answered, [1.0, 6.0, 3.0, 1.0], [10, 2, 30, 8], ([0, 0, 0, 1], [0, 1, 0, 1]))
    assert [(g.name, g.prompts, g.kl, g.loops) for g in found.groups] == [("b", 2, 0.7, (1, 2)), ("a", 2, 0.1, (0, 0))]
    assert [g.worst.prompt for g in found.groups] == ["p1", "p0"]
    assert "b 0.7 (1 more of 2 answers loop), a 0.1" in found.lines()[0]
    assert found.lines()[2:] == ["  dense:  d1", "  pruned: q1"]
    assert Forgotten.from_document(json.loads(json.dumps(found.to_document()))) == found


@pytest.fixture(scope="module")
def check(embedded_model):
    model, tokenizer = embedded_model
    tokeniser = Tokeniser(tokenizer, 512, TokenOptions())
    records = [*general_records(["arithmetic"])[:6], *general_records(["japanese"])[-6:]]
    made = GeneralCheck(model, tokeniser, batch_size=12, records=records, answer_tokens=20)
    yield made
    made.close()


def test_the_dense_model_has_forgotten_nothing(check, embedded_model) -> None:
    found = check.compare(embedded_model[0])
    assert {group.name for group in found.groups} == {"arithmetic", "japanese"}
    for group in found.groups:
        assert group.kl == pytest.approx(0, abs=1e-6)
        assert group.loops[0] == group.loops[1]
        assert group.worst.dense == group.worst.pruned


def test_a_cut_model_has_forgotten_something(check, embedded_model) -> None:
    model, _ = embedded_model
    cut = Selection(None, None, None, "hand", "hand", "drop", 32, 4, {i: [0, 1, 2, 3] for i in range(4)}, 0.125)
    done = []
    with masked(model, cut):
        found = check.compare(model, done.append)
    assert sum(done) == len(check.records) == 12
    assert found.groups[0].kl >= found.groups[1].kl > 0.1
    assert found.groups[0].worst.dense != found.groups[0].worst.pruned
