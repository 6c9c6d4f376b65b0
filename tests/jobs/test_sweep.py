"""A sweep of the embedded model, from a file to a recommendation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shape_moe.calibration.example_maker import SPLIT_KEY, AnswerOptions
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions, Record, prompt_hash
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.demo.tasks import examples
from shape_moe.errors import DataError, UsageError
from shape_moe.evaluation import bench
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.jobs import search, session
from shape_moe.jobs import sweep as job
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.sweep import SweepOptions, sweep
from shape_moe.jobs.trace import trace
from shape_moe.progress import Silent
from shape_moe.pruning import masks
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.method import Method
from shape_moe.selection.selection import load_selection
from shape_moe.tracing.trace import load_trace, merge_traces
from support.data import write_lines
from support.interruptions import stopped_after


class Notes(Silent):
    """Keeps what the user would see."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "sorting.jsonl", examples("sorting", 120, seed=1))


def note_held_out(patch: pytest.MonkeyPatch) -> list[Record]:
    """The records that searches judge by from now on."""
    whole, judged = search.held_out_set, []

    def noted(session, calibrator, *rest):
        judged.extend(calibrator.records)
        return whole(session, calibrator, *rest)

    patch.setattr(search, "held_out_set", noted)
    return judged


@pytest.fixture(scope="module")
def swept(embedded, task_file, tmp_path_factory):
    """A sweep's result, its folder, and the records that it judged by."""
    out = tmp_path_factory.mktemp("sweep") / "result"
    options = SweepOptions(
        keep_rates=(0.8, 0.3), methods=(Method("shape"), Method("easy-ep")), held_out=60, limit=Limit("max_kl", 0.05)
    )
    data = ExampleOptions(DataOptions(str(task_file), samples=40), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        judged = note_held_out(patch)
        return sweep(embedded, options, out, data=data), out, judged


def test_every_point_is_judged_and_the_result_is_written(swept) -> None:
    result, out, _ = swept
    document = json.loads((out / "sweep.json").read_text())
    assert document == json.loads(json.dumps(result.document))
    assert [(p["scorer"], p["keep_asked"]) for p in document["points"]] == [
        ("shape", 0.8),
        ("shape", 0.3),
        ("easy-ep", 0.8),
        ("easy-ep", 0.3),
    ]
    for point in document["points"]:
        kl = point["quality"]["kl"]
        assert kl["low"] <= kl["value"] <= kl["high"]
        assert point["meets_limit"] == (kl["high"] <= 0.05)
        assert point["bytes"] < document["dense"]["bytes"]
    chosen = document["points"][document["recommended"]]
    assert chosen["generation"]["exact_match"]["value"] >= 0.9
    recommended = load_selection(out / "recommended.json")
    assert recommended.keep == chosen["keep"]
    assert recommended.scorer == chosen["scorer"]
    assert sorted(path.name for path in out.iterdir()) == ["recommended.json", "sweep.json", "trace"]
    assert load_trace(out / "trace").info.source[SPLIT_KEY] == document["split"]


def test_calibration_and_held_out_examples_do_not_overlap(swept) -> None:
    result, _, records = swept
    calibration, judged = result.document["calibration"], set(map(prompt_hash, records))
    assert (len(set(calibration["prompts"])), len(judged)) == (40, 60)
    assert result.document["held_out"]["examples"] == 60
    assert SeenPrompts.of_source(calibration).count(records) == 0
    assert "40 examples to calibrate with and 60 held out" in result.document["split"]


def note_selections(monkeypatch) -> list[float]:
    """The keep rates asked for of the selections that are masked from now on."""
    whole, seen = masks.masked, []
    monkeypatch.setattr(masks, "masked", lambda model, chosen: seen.append(chosen.keep_asked) or whole(model, chosen))
    return seen


def test_an_interrupted_sweep_goes_on_from_its_last_point(embedded, task_file, tmp_path, monkeypatch) -> None:
    options = SweepOptions(keep_rates=(0.9, 0.7, 0.5), held_out=30, generation=GenerationOptions(examples=4))
    data = ExampleOptions(DataOptions(str(task_file), samples=20), device="cpu")
    whole, chosen = bench.compare_with_dense, note_selections(monkeypatch)
    monkeypatch.setattr(bench, "compare_with_dense", stopped_after(2, whole)[0])
    with pytest.raises(KeyboardInterrupt):
        sweep(embedded, options, tmp_path / "out", data=data)
    partial = tmp_path / "out.partial"
    assert len((partial / "points.jsonl").read_text().splitlines()) == 2
    with (partial / "points.jsonl").open("a") as stream:
        stream.write('{"key": "cut')  # as a kill in the middle of a line leaves it
    assert chosen == [0.9, 0.7, 0.5]  # it stopped in the last one
    chosen.clear()
    counted, again = stopped_after(100, whole)
    monkeypatch.setattr(bench, "compare_with_dense", counted)
    notes = Notes()
    resumed = sweep(embedded, options, tmp_path / "out", data=data, progress=notes)
    assert (chosen[0], len(again)) == (0.5, 1)
    assert "2 points already done by the interrupted run." in notes.notes
    fresh = sweep(embedded, options, data=data)
    assert [p["quality"] for p in fresh.document["points"]] == [p["quality"] for p in resumed.document["points"]]


def test_written_answers_that_decide_are_made_once(embedded, task_file, tmp_path, monkeypatch) -> None:
    options = SweepOptions(
        keep_rates=(0.9, 0.7, 0.5),
        limit=Limit("max_drop", 0.5),
        held_out=16,
        generation=GenerationOptions(answer_pattern="(.*)"),
    )
    data = ExampleOptions(DataOptions(str(task_file), samples=20), device="cpu")
    whole = bench.generate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bench, "generate", stopped_after(3, whole)[0])  # the dense model, and two selections
        sweep(embedded, options, tmp_path / "out", data=data)
    counted, again = stopped_after(100, whole)
    monkeypatch.setattr(bench, "generate", counted)
    resumed = sweep(embedded, options, tmp_path / "out", data=data)
    assert len(again) == 2  # the dense model, and the selection that was left
    assert resumed.chosen.selection.keep_asked == 0.5
    again.clear()
    fresh = sweep(embedded, options, data=data)
    assert len(again) == 4
    assert fresh.document["points"] == resumed.document["points"]


def test_the_seed_draws_what_a_trace_is_judged_by(embedded, task_file, tmp_path, monkeypatch) -> None:
    data = ExampleOptions(DataOptions(str(task_file), samples=30), device="cpu")
    trace(embedded, data, tmp_path / "trace")
    judged, plan_search = [], job.plan_search

    def planned(*given):
        judged.append(plan_search(*given).held_out.records)
        raise KeyboardInterrupt  # the search itself need not start

    monkeypatch.setattr(job, "plan_search", planned)

    def drawn(seed: int) -> set[str]:
        with pytest.raises(KeyboardInterrupt):
            sweep(embedded, SweepOptions(scoring=ScoreOptions(seed=seed), held_out=20), trace=tmp_path / "trace")
        return {prompt_hash(record) for record in judged.pop()}

    first, second = drawn(0), drawn(1)
    assert len(first) == len(second) == 20
    assert first == drawn(0)
    assert first != second


def test_another_engine_is_refused_before_the_work(embedded, task_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(session, "load_original", lambda *_: pytest.fail("the model was loaded"))
    data = ExampleOptions(DataOptions(str(task_file), samples=20), engine="vllm")
    for out in (None, tmp_path / "out"):
        with pytest.raises(UsageError, match=r"shape-moe trace --engine vllm.*--trace"):
            sweep(embedded, SweepOptions(held_out=20), out, data=data)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_judges_by_what_it_has_not_seen(embedded, task_file, tmp_path, monkeypatch) -> None:
    data = ExampleOptions(DataOptions(str(task_file), samples=30), device="cpu")
    traced = trace(embedded, data, tmp_path / "trace")
    options = SweepOptions(keep_rates=(0.8,), held_out=500, generation=GenerationOptions(examples=4))
    records = note_held_out(monkeypatch)
    result = sweep(embedded, options, trace=tmp_path / "trace")
    seen, judged = SeenPrompts.of_source(traced.info.source), {prompt_hash(record) for record in records}
    assert (len(judged), result.document["held_out"]["examples"]) == (90, 90)
    assert seen.count(records) == 0
    everything = load_records(DataOptions(str(task_file)))
    assert judged == {prompt_hash(record) for record in everything if record not in seen}


def test_contamination_is_told_and_left_out(embedded, task_file, tmp_path) -> None:
    lines = task_file.read_text().splitlines(keepends=True)
    for name, chosen in (("calibration", lines[:30]), ("held", lines[20:60]), ("same", lines[:30])):
        (tmp_path / f"{name}.jsonl").write_text("".join(chosen))
    options = SweepOptions(keep_rates=(0.8,), generation=GenerationOptions(examples=4))
    data = ExampleOptions(DataOptions(str(tmp_path / "calibration.jsonl")), device="cpu")
    progress = Notes()
    result = sweep(embedded, options, data=data, held_out=tmp_path / "held.jsonl", progress=progress)
    assert result.document["held_out"]["examples"] == 30
    assert any("10 examples" in note and "were left out" in note for note in progress.notes)
    with pytest.raises(DataError, match="has seen every example"):
        sweep(embedded, options, data=data, held_out=tmp_path / "same.jsonl")


def test_records_that_cannot_be_judged_by_are_counted(embedded, task_file, tmp_path) -> None:
    held = [{"prompt": "p", "response": "x" * 5000}, *examples("sorting", 20, seed=7)]
    file = write_lines(tmp_path / "held.jsonl", held)
    answers = AnswerOptions(skip_bad=True)
    data = ExampleOptions(DataOptions(str(task_file), samples=20), answers=answers, device="cpu")
    options, progress = SweepOptions(keep_rates=(0.8,), generation=GenerationOptions(examples=4)), Notes()
    result = sweep(embedded, options, data=data, held_out=file, progress=progress)
    assert result.document["held_out"]["examples"] == 20
    assert [note for note in progress.notes if "1 record left out" in note and "held.jsonl, line 1" in note]


def test_traces_that_do_not_name_their_prompts_need_other_examples(embedded, task_file, tmp_path) -> None:
    data = ExampleOptions(DataOptions(str(task_file), samples=20), device="cpu")
    traced = trace(embedded, data)
    nameless = {key: value for key, value in traced.info.source.items() if key != "prompts"}
    replace(traced, info=replace(traced.info, source=nameless)).save(tmp_path / "old")
    with pytest.raises(UsageError, match="--held-out"):
        sweep(embedded, trace=tmp_path / "old")
    both = merge_traces([traced, traced])
    seen = SeenPrompts.of_source(both.info.source)
    assert seen.complete
    assert seen.parts == 2 * SeenPrompts.of_source(traced.info.source).parts


def test_a_limit_alone_is_bisected_and_memory_bounds_the_advice(embedded, task_file) -> None:
    data = ExampleOptions(DataOptions(str(task_file), samples=40), device="cpu")
    options = SweepOptions(limit=Limit("max_kl", 0.05), held_out=40, generation=GenerationOptions(examples=8))
    result = sweep(embedded, options, data=data)
    keeps = [point.selection.keep_asked for point in result.recommendation.points]
    assert keeps[0] == 0.5
    assert len(keeps) == 7
    within = [p.selection.kept for p in result.recommendation.points if p.meets]
    assert result.chosen.selection.kept == min(within)
    small = SweepOptions(
        keep_rates=(0.9, 0.2), limit=Limit("max_kl", 0.05), held_out=40, most_keep=0.5, generation=GenerationOptions(8)
    )
    narrow = sweep(embedded, small, data=data)
    assert [point.fits for point in narrow.recommendation.points] == [False, True]
    assert [point.meets for point in narrow.recommendation.points] == [True, False]
    assert narrow.chosen is None
    assert narrow.recommendation.reason.startswith("No point of those that fit")


def test_a_fall_of_nothing_is_no_limit(embedded, tmp_path) -> None:
    file = tmp_path / "noise.jsonl"
    rows = [{"prompt": f"sort {i}{i + 1}{i + 2}=", "response": f"wrong {i}\n"} for i in range(60)]
    write_lines(file, rows)
    data = ExampleOptions(DataOptions(str(file), samples=20), device="cpu")
    with pytest.raises(UsageError, match="0 % of the held-out examples"):
        sweep(embedded, SweepOptions(limit=Limit("max_drop", 0.2), held_out=30), data=data)


def test_too_few_examples_for_a_limit_are_refused_before_the_work(embedded, task_file, monkeypatch) -> None:
    monkeypatch.setattr(session, "load_original", lambda *_: pytest.fail("the model was loaded"))
    data = ExampleOptions(DataOptions(str(task_file), samples=20), device="cpu")
    options = SweepOptions(limit=Limit("max_drop", 0.01), held_out=60, methods=(Method(), Method(rule="uniform")))
    with pytest.raises(UsageError, match=r"below 7\.8 % for 2 methods together.*judge by 498 or more"):
        sweep(embedded, options, data=data)


def test_senseless_options_are_refused(embedded) -> None:
    with pytest.raises(UsageError, match="Give examples"):
        sweep(embedded)
    with pytest.raises(UsageError, match="at least one method"):
        SweepOptions(methods=())
    with pytest.raises(UsageError, match="no scorer 'best'"):
        SweepOptions(methods=(Method("best"),))
    with pytest.raises(UsageError, match="keep rate"):
        SweepOptions(keep_rates=(1.5,))
    with pytest.raises(UsageError, match="stock needs routing reroute"):
        SweepOptions(methods=(Method(target="stock"),))
