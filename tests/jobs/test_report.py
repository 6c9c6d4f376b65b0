"""The job: every kind of source, what does not belong together, and a file that is whole or not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import shape_moe
from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import DataError, FingerprintError, ShapeMoeError, UsageError
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.report import original_bytes
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection
from support.data import routing_trace, synthetic_trace
from support.results import write_evaluation, write_sweep
from support.selections import random_selection
from support.tiny_models import FAMILIES

QUICKLY = PruneOptions(check_logits=False, device="cpu")


@pytest.fixture
def traced(tmp_path) -> Path:
    trace = routing_trace()
    (tmp_path / "trace").mkdir()
    trace.save(tmp_path / "trace")
    select_from_trace(trace, SelectOptions(keep=0.5)).save(tmp_path / "selection.json")
    score_trace(trace).table().write_csv(tmp_path / "values.csv")
    return tmp_path


def words(file: Path) -> str:
    """The page without the plotting library."""
    text = file.read_text(encoding="utf-8")
    return text[: text.index("plotly.js v")].replace("\N{NO-BREAK SPACE}", " ")


def test_a_trace_with_and_without_a_selection(traced) -> None:
    result = shape_moe.report(traced / "trace", traced / "r.html")
    assert result.path == traced / "r.html"
    assert result.size == result.path.stat().st_size
    assert result.sections == ("values", "agreement", "coverage", "coalitions", "provenance")
    assert "Nothing is selected yet" in words(result.path)
    with_selection = shape_moe.report(traced / "trace", traced / "s.html", selection=traced / "selection.json")
    assert with_selection.sections == ("layers", "values", "agreement", "coverage", "coalitions", "provenance")
    assert "32 of 64 experts kept." in words(with_selection.path)


def test_a_table_of_values(traced) -> None:
    result = shape_moe.report(traced / "values.csv", traced / "r.html", selection=traced / "selection.json")
    assert result.sections == ("layers", "values", "coverage", "provenance")
    assert "the table of values" in words(result.path)


def test_a_sweep_folder_brings_trace_selection_and_sizes(traced) -> None:
    print_of = routing_trace().info.fingerprint
    points = {"total": 64, "keeps": (0.8, 0.5), "dense_bytes": 8 * 2**30, "fingerprint": print_of}
    write_sweep(traced, **points)
    (traced / "selection.json").rename(traced / "recommended.json")
    write_evaluation(traced / "e")
    result = shape_moe.report(traced, traced / "r.html", evaluation=traced / "e")
    assert result.sections == (
        *("sweep", "quality", "footprint", "layers", "values", "agreement", "coverage", "coalitions", "provenance"),
    )
    assert "from 8.00 GiB to 4.24 GiB" in words(result.path)
    with pytest.raises(UsageError, match="is a sweep already: leave --sweep out"):
        shape_moe.report(traced, traced / "x.html", sweep=traced)
    alone = traced / "alone"
    alone.mkdir()
    shutil.copy(traced / "sweep.json", alone)
    assert shape_moe.report(alone, traced / "a.html").sections == ("sweep", "provenance")
    beside = shape_moe.report(traced / "values.csv", traced / "b.html", sweep=traced / "sweep.json")
    assert beside.sections == ("sweep", "values", "coverage", "provenance")


@pytest.mark.parametrize("routing", ["drop", "reroute"])
def test_sizes_are_counted_back(checkpoint, tmp_path, family, routing) -> None:
    """What a checkpoint was pruned from is known from its tensors, for every family."""
    snapshot = open_snapshot(checkpoint(family))
    selection = random_selection(snapshot, routing, "ragged")
    shape_moe.prune(snapshot.path, tmp_path / "out", QUICKLY, selection=selection)
    assert original_bytes(open_snapshot(tmp_path / "out"), selection) == snapshot.total_bytes
    if family == FAMILIES[0]:
        result = shape_moe.report(tmp_path / "out", tmp_path / "r.html")
        assert result.sections == ("layers", "values", "provenance")
        assert "counted back from this checkpoint" in words(result.path)


def test_sizes_from_the_model(checkpoint, tmp_path) -> None:
    snapshot = open_snapshot(checkpoint("olmoe"))
    selection = replace(random_selection(snapshot, "drop", "ragged"), fingerprint=fingerprint(snapshot))
    shape_moe.prune(snapshot.path, tmp_path / "out", QUICKLY, selection=selection)
    shape_moe.report(tmp_path / "out", tmp_path / "r.html", model=snapshot.path)
    assert "of the original (measured)" in words(tmp_path / "r.html")
    with pytest.raises(UsageError, match="experts per layer; the model has"):
        shape_moe.report(tmp_path / "out", tmp_path / "s.html", model=checkpoint("mixtral"))
    with pytest.raises(UsageError, match="holds its selection: leave --selection out"):
        shape_moe.report(tmp_path / "out", tmp_path / "s.html", selection=selection)


def test_scorers_that_are_not_here_are_named(traced) -> None:
    selection = shape_moe.load_selection(traced / "selection.json")
    shape_moe.report(traced / "trace", traced / "r.html", selection=replace(selection, scorer="theirs"))
    text = words(traced / "r.html")
    assert "made by &#39;theirs&#39;, which is not a scorer of this installation" in text
    assert text.index('class="warnings"') < text.index("theirs&#39;, which")


def test_values_are_weighted_as_the_selection_was(traced) -> None:
    trace = synthetic_trace()
    (traced / "t").mkdir()
    trace.save(traced / "t")
    from shape_moe.scoring.registry import ScoreOptions
    from shape_moe.tracing.token_weights import SegmentWeights

    scoring = ScoreOptions(SegmentWeights(0.25, 2.0), seed=7)
    selection = select_from_trace(trace, SelectOptions(keep=0.5, method=Method("random"), scoring=scoring))
    shape_moe.report(traced / "t", traced / "r.html", selection=selection)
    mass = sum(selection.mass_kept.values()) / 3
    assert f"{100 * mass:.1f} %" in words(traced / "r.html")


def test_top_1_models_are_valued_by_frequency(tmp_path) -> None:
    trace = routing_trace(top_k=1)
    (tmp_path / "t").mkdir()
    trace.save(tmp_path / "t")
    result = shape_moe.report(tmp_path / "t", tmp_path / "r.html")
    assert "the scorer frequency" in words(result.path)
    assert "agreement" in result.sections


def test_what_does_not_belong_together_is_refused(traced) -> None:
    selection = shape_moe.load_selection(traced / "selection.json")
    other = replace(selection, fingerprint="sha256:" + "c" * 64)
    with pytest.raises(FingerprintError, match="was made from another model"):
        shape_moe.report(traced / "trace", traced / "r.html", selection=other)
    write_sweep(traced / "sweep", fingerprint="sha256:" + "d" * 64)
    with pytest.raises(FingerprintError, match="The sweep was made from another model"):
        shape_moe.report(traced / "trace", traced / "r.html", sweep=traced / "sweep")
    write_evaluation(traced / "evaluation", fingerprint="sha256:" + "e" * 64)
    with pytest.raises(FingerprintError, match="The evaluation was made from another model"):
        shape_moe.report(traced / "trace", traced / "r.html", evaluation=traced / "evaluation")
    narrow = Selection(None, None, None, "shape", "coverage", "drop", 8, 4, {0: [1]}, 0.5)
    with pytest.raises(UsageError, match="1 layers of 8 experts, but .* 4 layers of 16"):
        shape_moe.report(traced / "trace", traced / "r.html", selection=narrow)
    assert not (traced / "r.html").exists()


def test_sources_that_are_none(traced, tmp_path) -> None:
    for source, message in (
        (tmp_path / "nowhere", "There is no folder or file"),
        (tmp_path / "none.csv", "There is no file"),
        (tmp_path, "is not something that shape-moe wrote and a report can show"),
    ):
        with pytest.raises(UsageError, match=message):
            shape_moe.report(source, tmp_path / "r.html")
    (tmp_path / "bad.json").write_text(json.dumps({"format_version": 1, "verb": "sweep"}))
    with pytest.raises(DataError, match="is missing"):
        shape_moe.report(traced / "trace", tmp_path / "r.html", sweep=tmp_path / "bad.json")
    assert not (tmp_path / "r.html").exists()


def test_an_existing_file_is_replaced_only_by_force(traced, monkeypatch) -> None:
    file = traced / "r.html"
    file.write_text("mine")
    before = set(traced.iterdir())
    with pytest.raises(UsageError, match=r"exists.*--force"):
        shape_moe.report(traced / "values.csv", file)
    with pytest.raises(UsageError, match="is a folder"):
        shape_moe.report(traced / "values.csv", traced)
    from shape_moe.jobs import report as job

    def broken(*_args: object) -> None:
        raise ShapeMoeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(job, "render_report", broken)
        with pytest.raises(ShapeMoeError, match="broken"):
            shape_moe.report(traced / "values.csv", file, force=True)
    assert file.read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", broken)
        with pytest.raises(ShapeMoeError, match="broken"):
            shape_moe.report(traced / "values.csv", file, force=True)
    assert file.read_text() == "mine"
    assert set(traced.iterdir()) == before
    shape_moe.report(traced / "values.csv", file, force=True)
    assert file.read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")
    assert set(traced.iterdir()) == before


def test_nothing_is_read_or_scored_twice(traced, checkpoint, monkeypatch) -> None:
    from shape_moe.jobs import report as job
    from shape_moe.reporting import html

    snapshot = open_snapshot(checkpoint("olmoe"))
    shape_moe.prune(snapshot.path, traced / "out", QUICKLY, selection=random_selection(snapshot, "drop", "ragged"))
    calls: list[str] = []

    def counting(name: str):
        original = getattr(job, name)
        monkeypatch.setattr(job, name, lambda *args: (calls.append(f"{name} {args[-2]}"), original(*args))[1])

    monkeypatch.setattr(job, "open_snapshot", lambda path: (calls.append("open"), open_snapshot(path))[1])
    shape_moe.report(traced / "out", traced / "o.html")
    assert calls == ["open"]
    calls.clear()
    counting("score_trace")
    shape_moe.report(traced / "trace", traced / "r.html", selection=traced / "selection.json")
    assert len(calls) == len(set(calls)) > 3
    assert html.plotly_script() is html.plotly_script()


def test_a_scorer_that_cannot_value_the_trace_says_what_it_needs(traced) -> None:
    selection = replace(shape_moe.load_selection(traced / "selection.json"), scorer="contribution")
    with pytest.raises(UsageError, match="'contribution' needs .* does not hold"):
        shape_moe.report(traced / "trace", traced / "r.html", selection=selection)
    assert not (traced / "r.html").exists()


def test_a_selection_and_an_evaluation_are_sources_by_any_name(traced) -> None:
    assert shape_moe.report(traced / "selection.json", traced / "s.html").sections == ("layers", "values", "provenance")
    write_evaluation(traced / "e")
    (traced / "e" / "evaluation.json").rename(traced / "figures.json")
    result = shape_moe.report(traced / "figures.json", traced / "e.html")
    assert result.sections == ("sizes", "quality", "footprint", "provenance")
    assert "Qwen/Qwen3-30B-A3B beside 2 pruned models" in words(result.path)
    with pytest.raises(UsageError, match="is an evaluation already: leave --evaluation out"):
        shape_moe.report(traced / "figures.json", traced / "x.html", evaluation=traced / "figures.json")
    (traced / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="is not something that shape-moe wrote and a report can show"):
        shape_moe.report(traced / "other.json", traced / "x.html")


def test_sources_of_one_model_are_shown_together_and_others_one_after_the_other(traced) -> None:
    print_of = routing_trace().info.fingerprint
    write_sweep(traced / "sweep", total=64, keeps=(0.8, 0.5), dense_bytes=8 * 2**30, fingerprint=print_of)
    write_evaluation(traced / "e", fingerprint=print_of)
    parts = [traced / "e", traced / "sweep", traced / "trace", traced / "selection.json"]
    together = shape_moe.report(parts, traced / "t.html")
    single = ("sweep", "quality", "footprint", "layers", "values", "agreement", "coverage", "coalitions", "provenance")
    assert together.sections == single
    assert shape_moe.report([*parts, traced / "trace"], traced / "u.html").sections == single  # named twice
    write_evaluation(traced / "f", fingerprint="sha256:" + "f" * 64, model="another/model")
    apart = shape_moe.report([*parts, traced / "f"], traced / "v.html")
    assert apart.sections == (*single, "sizes-2", "quality-2", "footprint-2", "provenance-2")
    text = words(apart.path)
    assert "2 results on synthetic, another/model" in text
    assert text.count('class="story ') == 5
    with pytest.raises(UsageError, match="at least one source"):
        shape_moe.report([], traced / "x.html")


def test_two_checkpoints_have_a_chapter_each(checkpoint, tmp_path) -> None:
    snapshot = open_snapshot(checkpoint("olmoe"))
    for place in (1, 2):
        selection = random_selection(snapshot, "drop", "ragged")
        shape_moe.prune(snapshot.path, tmp_path / f"p{place}", QUICKLY, selection=selection)
    result = shape_moe.report([tmp_path / "p1", tmp_path / "p2"], tmp_path / "r.html")
    assert result.sections == ("layers", "values", "provenance", "layers-2", "values-2", "provenance-2")
    text = words(result.path)
    assert text.count("Method: ") == 2
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_the_models_of_a_series_have_a_chapter_each(checkpoint, tmp_path) -> None:
    snapshot = open_snapshot(checkpoint("olmoe"))
    series = tmp_path / "series"
    for place in (1, 2):
        shape_moe.prune(
            snapshot.path, series / f"p{place}", QUICKLY, selection=random_selection(snapshot, "drop", "ragged")
        )
    names = [{"name": name} for name in ("p1", "gone", "p2")]
    (series / "series.json").write_text(json.dumps({"models": names}))
    for number, source in enumerate((series, series / "series.json")):
        result = shape_moe.report(source, tmp_path / f"{number}.html")
        assert result.sections == ("layers", "values", "provenance", "layers-2", "values-2", "provenance-2")
    for damaged in ({"models": [{"name": "gone"}]}, {"models": "p1"}, {}):
        (series / "series.json").write_text(json.dumps(damaged))
        with pytest.raises(UsageError, match="is a series of which no model is left"):
            shape_moe.report(series, tmp_path / "x.html")


@pytest.mark.parametrize("verb", ["demo", "experiment"])
@pytest.mark.parametrize(
    "content", [{}, {"rows": [], "models": []}, {"rows": [{"scorer": "dense"}], "models": [{"name": "m"}], "task": "t"}]
)
def test_a_damaged_demo_or_experiment_is_one_sentence(tmp_path, verb, content) -> None:
    file = tmp_path / f"{verb}.json"
    file.write_text(json.dumps({"format_version": 1, "verb": verb, "rule": "coverage", **content}))
    with pytest.raises(DataError, match=f"{verb}.json is damaged: "):
        shape_moe.report(file, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
