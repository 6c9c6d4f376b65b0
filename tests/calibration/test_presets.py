"""Presets: local copies of every set become the expected texts, and never those that models are judged by."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import polars as pl
import pytest

from shape_moe.calibration import presets as presets_module
from shape_moe.calibration.presets import Preset, find_preset, presets, with_base
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions, content_hash
from shape_moe.cli.main import run
from shape_moe.errors import DataError, UsageError
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from support.data import write_lines
from support.preset_rows import DEALT, GPQA_DIAMOND, GPQA_EXTENDED, SETS

DOCS = Path(__file__).parents[2] / "docs" / "presets.md"
FORMATS = ("d.jsonl", "d.parquet", "folder")


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        write_lines(path, rows)
    elif path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif path.suffix == ".csv":
        pl.DataFrame(rows).write_csv(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def texts(source: str, **options) -> list[tuple[str | None, str | None]]:
    return [(record.prompt, record.response) for record in load_records(DataOptions(source, **options))]


def test_every_preset_is_tested() -> None:
    assert set(presets()) == {*SETS, *DEALT, "gpqa-diamond"}


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("name", SETS)
def test_local_copies_become_the_expected_texts(tmp_path, name, file) -> None:
    path = write(tmp_path / file, [row for row, _, _ in SETS[name]])
    assert texts(f"preset:{name}@{path}") == [(prompt, response) for _, prompt, response in SETS[name]]


@pytest.mark.parametrize("name", DEALT)
def test_sets_without_a_split_are_dealt_out(tmp_path, name) -> None:
    rows = [row for row, _, _ in DEALT[name]]
    source = f"preset:{name}@{write(tmp_path / 'd.jsonl', rows)}"
    calibration, evaluation = texts(source), texts(source, split="evaluation")
    assert calibration == texts(source, split="calibration")
    expected = [(prompt, response) for _, prompt, response in DEALT[name]]
    assert sorted(calibration + evaluation) == sorted(expected)
    assert 0 < len(calibration) < len(evaluation)
    # the part does not depend on the order or on what else is there
    part = f"preset:{name}@{write(tmp_path / 'part.jsonl', rows[::-2])}"
    assert texts(part) == [pair for pair in expected[::-2] if pair in calibration]
    with pytest.raises(UsageError, match="--split calibration and --split evaluation; it has no 'validation'"):
        DataOptions(source, split="validation")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ""])
def test_gpqa_leaves_diamond_out(tmp_path, suffix) -> None:
    write(tmp_path / f"gpqa_extended{suffix}", GPQA_EXTENDED)
    write(tmp_path / f"gpqa_diamond{suffix}", GPQA_DIAMOND)
    source = f"preset:gpqa-diamond@{tmp_path}"
    calibration = texts(source)
    assert [prompt.split("\n")[0] for prompt, _ in calibration] == [f"Question {i}" for i in (0, 2, 3, 5, 7)]
    assert len(texts(source, split="evaluation")) == len(GPQA_DIAMOND)
    for prompt, response in calibration:
        number = re.match(r"Question (\d)", prompt)[1]
        choices = dict(re.findall(r"^([A-D])\. (.*)$", prompt, re.MULTILINE))
        assert choices[response] == f"right {number}"
        assert sorted(choices.values()) == sorted(f"{word} {number}" for word in ("right", "wrong", "worse", "worst"))
        assert prompt.endswith("\n\nAnswer with the letter of the right choice.")
    assert len({response for _, response in calibration}) > 1


def test_a_copy_of_gpqa_needs_both_configurations(tmp_path) -> None:
    file = write(tmp_path / "gpqa_extended.jsonl", GPQA_EXTENDED)
    for source in (tmp_path, file):
        with pytest.raises(DataError, match=r"leaves the records of gpqa_diamond out .*there is no gpqa_diamond in"):
            load_records(DataOptions(f"preset:gpqa-diamond@{source}"))
    write(tmp_path / "gpqa_diamond.jsonl", [{"Question": "q"}])
    with pytest.raises(DataError, match="line 1: preset gpqa-diamond tells records apart by 'Record ID'"):
        load_records(DataOptions(f"preset:gpqa-diamond@{tmp_path}"))


def test_splits_of_a_local_copy(tmp_path) -> None:
    rows = [row for row, _, _ in SETS["gsm8k"]]
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    source = f"preset:gsm8k@{tmp_path / 'd'}"
    assert (len(texts(source)), len(texts(source, split="test"))) == (2, 1)
    with pytest.raises(DataError, match="no split 'dev'"):
        load_records(DataOptions(source, split="dev"))


def test_fields_can_be_overridden_and_used_for_strata(tmp_path) -> None:
    rows = [row for row, _, _ in SETS["medmcqa"]]
    source = f"preset:medmcqa@{write(tmp_path / 'd.jsonl', rows)}"
    assert texts(source, fields={"prompt": "question"}) == [("Which organ?", "C"), ("And which?", "A")]
    assert all(record.lacks_response for record in load_records(DataOptions(source, fields={"response": "none"})))
    records = load_records(DataOptions(source, stratify="subject_name"))
    assert {record.group for record in records} == {"Anatomy"}


def test_what_a_preset_decides_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="Preset gsm8k decides the configuration itself; leave --subset out"):
        DataOptions("preset:gsm8k", subset="socratic")
    with pytest.raises(UsageError, match="names no local copy"):
        DataOptions("preset:gsm8k@")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "q", "solution": "s"}, "'answer' is undefined; its fields are question, solution"),
        ("gsm8k", {"question": None, "answer": "a"}, "a field has no value"),
        ("medmcqa", {**SETS["medmcqa"][0][0], "cop": 4}, "'4' is neither a letter nor the place of one of 4"),
        ("medmcqa", {**SETS["medmcqa"][0][0], "cop": -1}, "'-1' is neither a letter nor the place"),
        ("logiqa", {**SETS["logiqa"][0][0], "answer": "E"}, "'E' is neither a letter nor the place of one of 4"),
        ("medmcqa", {**SETS["medmcqa"][0][0], "opb": None}, "a field has no value"),
        ("arc-easy", {**SETS["arc-easy"][0][0], "answerKey": "E"}, "'E' is not in list"),
        ("ontonotes5", {"tokens": ["a"], "tags": [37]}, "there is no tag 37"),
        ("ontonotes5", {"tokens": ["a"], "tags": [-1]}, "there is no tag -1"),
        ("ontonotes5", {"tokens": ["a", "b"], "tags": [0]}, "shorter"),
    ],
)
def test_rows_of_another_kind_are_named(tmp_path, name, row, message) -> None:
    file = write(tmp_path / "d.jsonl", [SETS[name][0][0], row])
    with pytest.raises(DataError, match=message) as caught:
        load_records(DataOptions(f"preset:{name}@{file}"))
    assert f"{file}, line 2: the record is not one of preset {name}: " in str(caught.value)


def test_sets_on_the_hub_are_asked_for_by_their_names(monkeypatch) -> None:
    asked = []

    def read(source, subset, split, revision=None):
        asked.append((source, subset, split, revision))
        return iter(())

    monkeypatch.setattr(presets_module, "read_rows", read)
    for name in presets():
        with pytest.raises(DataError, match=f"preset:{name} holds no records"):
            load_records(DataOptions(f"preset:{name}"))
    assert ("openai/gsm8k", "main", "train", None) in asked
    assert ("tner/ontonotes5", None, "train", "refs/convert/parquet") in asked
    assert ("Idavidrein/gpqa", "gpqa_diamond", "train", None) in asked
    assert ("truthfulqa/truthful_qa", "generation", "validation", None) in asked


def test_a_set_that_cannot_be_loaded_says_how_to_go_on(tmp_path) -> None:
    with pytest.raises(DataError, match=r"openai/gsm8k is read with --data preset:gsm8k@PATH"):
        load_records(DataOptions("preset:gsm8k"))
    with pytest.raises(DataError, match=r"terms must be accepted on the hub first.*preset:gpqa-diamond@PATH"):
        load_records(DataOptions("preset:gpqa-diamond"))
    with pytest.raises(DataError, match=r"^There is no file .*nowhere\.jsonl\.$"):
        load_records(DataOptions(f"preset:gsm8k@{tmp_path / 'nowhere.jsonl'}"))


def test_a_trace_says_which_preset_it_was_made_with(tmp_path, embedded) -> None:
    rows = [row for row, _, _ in SETS["gsm8k"]]
    source = f"preset:gsm8k@{write(tmp_path / 'd.jsonl', rows)}"
    made = trace(embedded, ExampleOptions(DataOptions(source), device="cpu")).info.source
    assert (made["data"], made["split"]) == (source, "train")
    composed = [{"prompt": prompt, "response": response} for _, prompt, response in SETS["gsm8k"]]
    assert made["content_hash"] == content_hash(
        load_records(DataOptions(str(write(tmp_path / "composed.jsonl", composed))))
    )


def test_the_command_lists_the_presets(tmp_path, capsys, embedded) -> None:
    assert run(["trace", str(embedded), "--data", "preset:nope", "-o", str(tmp_path / "t")]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"There is no preset 'nope'; the presets are {', '.join(presets())}." in message


def test_the_documentation_lists_what_there_is() -> None:
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert lines == [table_line(preset) for preset in presets().values()]


def table_line(preset: Preset) -> str:
    read = f"{preset.dataset}{f', {preset.subset}' if preset.subset else ''}, {preset.split}"
    how = f", one in {preset.one_in}" if preset.one_in else f", without {preset.without}" if preset.without else ""
    cells = [
        f"`{preset.name}`",
        preset.title,
        read + how,
        preset.evaluation,
        preset.licence + (" (gated)" if preset.gated else ""),
        "yes" if preset.verified else "**no**",
    ]
    return f"| {' | '.join(cells)} |"


def test_only_presets_are_presets() -> None:
    assert find_preset("gsm8k") is None
    assert DataOptions("preset.jsonl").split == "train"


def test_local_copies_are_found_beside_a_file_that_names_them(tmp_path) -> None:
    assert with_base("preset:gsm8k@d/x.jsonl", tmp_path) == f"preset:gsm8k@{tmp_path / 'd' / 'x.jsonl'}"
    assert with_base("preset:gsm8k@a@b.csv", tmp_path) == f"preset:gsm8k@{tmp_path / 'a@b.csv'}"
    assert with_base("preset:gsm8k@/d.csv", tmp_path) == "preset:gsm8k@/d.csv"
    assert with_base("preset:gsm8k@~/d.csv", tmp_path) == f"preset:gsm8k@{Path.home() / 'd.csv'}"
    for source in ("preset:gsm8k", "preset:gsm8k@", "a@b.jsonl"):
        assert with_base(source, tmp_path) == source
