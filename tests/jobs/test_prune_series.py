"""Series of models at several keep rates: from one trace, each inside the larger one, all there or none."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from shape_moe.architectures.gguf_file import read_gguf
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.jobs import prune as single
from shape_moe.jobs import prune_series as job
from shape_moe.jobs.choice import ChoiceOptions
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.prune_series import prune_series
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.jobs.verify import verify
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import load_selection
from support.data import write_lines
from support.gguf_files import chats, gguf_model, save_gguf
from support.interruptions import stopped_after

KEEPS = (0.6, 0.85, 0.75)
PLAIN = PruneOptions(device="cpu", judgement=None, check_logits=False)
QUICK = JudgementOptions(general=False, answers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_lines(tmp_path_factory.mktemp("data") / "sorting.jsonl", examples("sorting", 40, seed=1)))


@pytest.fixture(scope="module")
def traced(embedded: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace") / "t"
    trace(embedded, ExampleOptions(data=DataOptions(data, samples=25), device="cpu"), folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(gguf_model("qwen3_moe"), tmp_path_factory.mktemp("gguf") / "model.gguf")


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_series_of_folders(embedded, traced, tmp_path) -> None:
    options = PruneOptions(SelectOptions(1.0), device="cpu", judgement=None)
    result = prune_series(embedded, tmp_path / "small", KEEPS, options, trace=traced)
    assert result.path == tmp_path / "small"
    assert [model.path for model in result.models] == [tmp_path / "small" / f"small-{k}" for k in (0.85, 0.75, 0.6)]
    assert {p.name for p in tmp_path.iterdir()} == {"small"}
    top = {"README.md", "series.json", "shape", "small-0.85", "small-0.75", "small-0.6"}
    assert {p.name for p in result.path.iterdir()} == top
    chosen = [load_selection(model.path) for model in result.models]
    assert [selection.kept for selection in chosen] == [109, 96, 77]
    for larger, smaller in pairwise(chosen):
        assert not (smaller.mask() & ~larger.mask()).any()
    alone = prune(embedded, tmp_path / "alone", replace(options, select=SelectOptions(0.85)), trace=traced)
    ours, theirs = files(result.models[0].path), files(alone.path)
    assert ours.keys() == theirs.keys()
    cards = {"README.md", "shape/manifest.json"}
    assert all(ours[name] == theirs[name] for name in theirs if name not in cards)
    for model in result.models:
        assert model.logits is not None
        assert model.logits.passed
        assert all(check.passed for check in verify(model.path, original=embedded, device="cpu"))
        card = (model.path / "README.md").read_text()
        assert [line.split(" | ")[:2] for line in card.splitlines() if line.startswith("| small-")] == [
            ["| small-0.85", "109 of 128 (85 %)"],
            ["| small-0.75", "96 of 128 (75 %)"],
            ["| small-0.6", "77 of 128 (60 %)"],
        ]
    told = json.loads((result.path / "series.json").read_text())
    assert [(entry["name"], entry["kept"]) for entry in told["models"]] == [
        ("small-0.85", 109),
        ("small-0.75", 96),
        ("small-0.6", 77),
    ]
    prune_series(embedded, tmp_path / "small", (0.5, 0.25), replace(options, force=True), trace=traced)
    assert {p.name for p in result.path.iterdir()} == {"README.md", "series.json", "shape", "small-0.5", "small-0.25"}


def test_a_series_of_gguf_files_is_judged_together(file, tmp_path) -> None:
    chosen = write_lines(tmp_path / "chats.jsonl", chats(40))
    stock = SelectOptions(1.0, Method(routing="reroute", target="stock"), allow_rounding=True)
    options = PruneOptions(stock, device="cpu", judgement=QUICK)
    result = prune_series(file, tmp_path / "small.gguf", KEEPS, options, data=str(chosen))
    assert result.path == tmp_path / "small"
    names = {f"small-{keep}{end}" for keep in KEEPS for end in (".gguf", ".shape")}
    assert {p.name for p in result.path.iterdir()} == {"README.md", "series.json", "shape", *names}
    assert [model.selection.equal_count for model in result.models] == [13, 12, 9]
    for larger, smaller in pairwise(result.models):
        assert not (smaller.selection.mask() & ~larger.selection.mask()).any()
    options = replace(options, select=replace(stock, keep=0.85))
    alone = prune(file, tmp_path / "alone.gguf", options, data=str(chosen))
    ours, theirs = read_gguf(result.models[0].path), read_gguf(alone.path)
    assert ours.metadata["shape_moe.tensors"] == theirs.metadata["shape_moe.tensors"]
    assert alone.judgement is not None
    judged = [model.judgement for model in result.models]
    assert judged[0] is not None
    assert judged[0].verdict.falls == alone.judgement.verdict.falls
    kl = [max(fall.kl or 0.0 for fall in judgement.verdict.falls) for judgement in judged if judgement is not None]
    assert len(kl) == 3
    assert kl[0] < kl[2]
    for model in result.models:
        assert all(check.passed for check in verify(model.path, original=file, device="cpu"))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_an_interrupted_series_is_gone_on_with(kind, embedded, traced, file, tmp_path, monkeypatch) -> None:
    if kind == "gguf":
        trace(file, ExampleOptions(DataOptions(str(write_lines(tmp_path / "c.jsonl", chats(12))))), tmp_path / "t")
    model, made_from = (file, tmp_path / "t") if kind == "gguf" else (embedded, traced)
    method = Method("reap", "uniform", "reroute", "stock")
    options = replace(PLAIN, select=SelectOptions(1.0, method, allow_rounding=True))
    prune_series(model, tmp_path / "a" / "small", KEEPS, options, trace=made_from)
    for calls, name in ((1, "write_weights"), (2, "describe"), (0, "_row")):
        with monkeypatch.context() as patched:
            stopped, _ = stopped_after(calls, getattr(job, name))
            patched.setattr(job, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                prune_series(model, tmp_path / "b" / "small", KEEPS, options, trace=made_from)
        assert [p.name for p in (tmp_path / "b").iterdir()] == ["small.partial"]
    with monkeypatch.context() as patched:
        stopped, _ = stopped_after(2, job.SeriesPlace.rename)
        patched.setattr(job.SeriesPlace, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            prune_series(model, tmp_path / "b" / "small", KEEPS, options, trace=made_from)
    prune_series(model, tmp_path / "b" / "small", KEEPS, options, trace=made_from)
    first, second = files(tmp_path / "a" / "small"), files(tmp_path / "b" / "small")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    with pytest.raises(UsageError, match="exists and is not empty"):
        prune_series(model, tmp_path / "b" / "small", KEEPS, options, trace=made_from)


def test_the_disk_must_hold_all_of_them(embedded, traced, tmp_path, monkeypatch) -> None:
    options = replace(PLAIN, select=SelectOptions(1.0))
    sizes = [m.bytes_after for m in prune_series(embedded, tmp_path / "a", KEEPS, options, trace=traced).models]
    free = SimpleNamespace(total=2**40, used=0, free=sum(sizes) + single._DISK_MARGIN - 8)
    monkeypatch.setattr(single.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ShapeMoeError, match="The 3 pruned models need about"):
        prune_series(embedded, tmp_path / "b", KEEPS, options, trace=traced)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    free.free += 16
    prune_series(embedded, tmp_path / "b", KEEPS, options, trace=traced)


def test_models_that_are_not_good_enough_are_named_so(file, tmp_path) -> None:
    chosen = write_lines(tmp_path / "chats.jsonl", chats(24))
    options = PruneOptions(device="cpu", judgement=replace(QUICK, require="safe"), check_logits=False)
    result = prune_series(file, tmp_path / "small", (0.5, 0.25), options, data=str(chosen))
    assert result.rejected
    names = {f"small-{keep}.rejected{end}" for keep in (0.5, 0.25) for end in (".gguf", ".shape")}
    assert {p.name for p in result.path.iterdir()} == {"README.md", "series.json", "shape", *names}
    assert all(model.path.is_file() for model in result.models)


def test_a_method_that_is_left_to_the_tool_is_chosen_at_the_smallest_rate(embedded, data, tmp_path) -> None:
    asked = ExampleOptions(DataOptions(data, samples=20), device="cpu")
    choice = ChoiceOptions(rules=("uniform",), routings=("reroute",), held_out_samples=8)
    options = replace(PLAIN, select=SelectOptions(1.0, Method("auto")), choice=choice, trace=asked)
    result = prune_series(embedded, tmp_path / "small", (0.8, 0.5), options)
    larger, smaller = (model.selection for model in result.models)
    assert (larger.kept, smaller.kept) == (102, 64)
    assert larger.method == smaller.method
    assert not (smaller.mask() & ~larger.mask()).any()
    assert smaller.choice is not None
    assert {entry["keep"] for entry in smaller.choice["tried"]} == {0.5}
    assert not (result.path / "shape" / "selection.json").exists()


def test_what_makes_no_series_is_refused_before_work(embedded, traced, tmp_path) -> None:
    with pytest.raises(UsageError, match="given twice"):
        prune_series(embedded, tmp_path / "a", (0.5, 0.5), PLAIN, trace=traced)
    with pytest.raises(UsageError, match="two keep rates or more"):
        prune_series(embedded, tmp_path / "a", (), PLAIN, trace=traced)
    with pytest.raises(ShapeMoeError, match="Cannot keep"):
        stock = SelectOptions(1.0, Method(routing="reroute", target="stock"))
        prune_series(embedded, tmp_path / "a", (0.5, 0.02), replace(PLAIN, select=stock), trace=traced)
    assert list(tmp_path.iterdir()) == []
