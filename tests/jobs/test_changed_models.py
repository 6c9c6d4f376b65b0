"""A model that changes between its trace and what is made of it, or while a job runs, is noticed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from shape_moe import source_files
from shape_moe.architectures.safetensors_file import read_header
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import FingerprintError, ShapeMoeError, UsageError
from shape_moe.jobs.evaluate import evaluate
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.evaluation_run import EvaluationRun
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import select
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.sweep import sweep
from shape_moe.jobs.trace import open_trace, trace
from shape_moe.progress import SILENT
from shape_moe.pruning import writers
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.trace import load_trace, merge_traces
from support.data import write_lines
from support.selections import seven_of_eight

OPTIONS = PruneOptions(SelectOptions(keep=0.6), device="cpu", check_logits=False)


@pytest.fixture
def model(embedded, tmp_path) -> Path:
    return shutil.copytree(embedded, tmp_path / "model")


@pytest.fixture
def data(tmp_path) -> str:
    return str(write_lines(tmp_path / "data.jsonl", examples("sorting", 12, seed=1)))


@pytest.fixture
def traced(model, data, tmp_path) -> Path:
    trace(model, traced_by(data), tmp_path / "t")
    return tmp_path / "t"


def traced_by(data: str) -> ExampleOptions:
    return ExampleOptions(DataOptions(data), device="cpu")


def change_expert(model: Path) -> None:
    """Change bytes of one expert in place; size, header, routers and even the time of change stay."""
    file = model / "model.safetensors"
    before = file.stat()
    slot = next(slot for name, slot in read_header(file)[0].items() if ".experts.3.up_proj" in name)
    with file.open("r+b") as stream:
        stream.seek(slot.start)
        stream.write(bytes(64))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def notes_of(model: Path, traced: Path, *, force: bool = False) -> list[str]:
    notes: list[str] = []
    progress = type("Noted", (type(SILENT),), {"note": lambda _self, text: notes.append(text)})()
    open_trace(traced, open_snapshot(model), progress, force=force)
    return notes


def test_writes_after_a_trace_notice_other_weights(model, data, traced, tmp_path) -> None:
    change_expert(model)
    with pytest.raises(FingerprintError, match=r"no longer fits .*model\.safetensors has changed .*--force"):
        prune(model, tmp_path / "out", OPTIONS, trace=traced)
    with pytest.raises(FingerprintError, match=r"model\.safetensors has changed"):
        sweep(model, data=traced_by(data), trace=traced)
    warnings = select(traced, 0.6).warnings
    assert any("is not as it was traced: model.safetensors has changed" in warning for warning in warnings)
    assert any("used all the same" in note for note in notes_of(model, traced, force=True))
    prune(model, tmp_path / "out", replace(OPTIONS, force=True), trace=traced)


def test_shards_that_are_added_or_go_are_noticed(model, traced) -> None:
    shutil.copyfile(model / "model.safetensors", model / "more.safetensors")
    with pytest.raises(FingerprintError, match=r"more\.safetensors was added"):
        notes_of(model, traced)


def test_copies_of_the_model_are_taken(model, traced, tmp_path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "model.safetensors").touch()
    assert notes_of(copy, traced) == []
    change_expert(copy)
    with pytest.raises(FingerprintError, match=r"model\.safetensors holds other weights than the traced one"):
        notes_of(copy, traced)


def test_copies_in_other_files_are_taken_with_a_note(model, traced, tmp_path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    names = dict.fromkeys(read_header(copy / "model-1.safetensors")[0], "model-1.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert len(notes_of(copy, traced)) == 1
    assert "could not be compared" in notes_of(copy, traced)[0]


def test_large_copies_are_compared_by_samples(model, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(source_files, "SMALL", 100_000)
    trace(model, traced_by(data), tmp_path / "t")
    copy = shutil.copytree(model, tmp_path / "copy")
    assert [note for note in notes_of(copy, tmp_path / "t") if "the rest was not compared" in note]
    header = (copy / "model.safetensors").read_bytes()[:8]
    with (copy / "model.safetensors").open("r+b") as stream:
        stream.seek(8 + int.from_bytes(header, "little"))
        size = (copy / "model.safetensors").stat().st_size - stream.tell()
        stream.write(bytes(size // 2))
    routers = [slot for name, slot in read_header(model / "model.safetensors")[0].items() if "gate.weight" in name]
    original = (model / "model.safetensors").read_bytes()
    with (copy / "model.safetensors").open("r+b") as stream:
        for slot in routers:
            stream.seek(slot.start)
            stream.write(original[slot.start : slot.start + slot.size])
    with pytest.raises(FingerprintError, match=r"holds other weights than the traced one"):
        notes_of(copy, tmp_path / "t")


def test_links_into_a_cache_are_followed(model, data, tmp_path) -> None:
    """As in a hub's cache: a snapshot's files are links to blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    trace(snapshot, traced_by(data), tmp_path / "t")
    assert notes_of(snapshot, tmp_path / "t") == []
    change_expert(model)
    with pytest.raises(FingerprintError, match=r"model\.safetensors has changed"):
        notes_of(snapshot, tmp_path / "t")


def test_older_traces_are_read(model, traced) -> None:
    document = json.loads((traced / "trace.json").read_text())
    del document["traced_files"]
    (traced / "trace.json").write_text(json.dumps(document))
    change_expert(model)
    assert notes_of(model, traced) == []


def test_traces_of_changed_weights_are_not_merged(model, data, traced) -> None:
    change_expert(model)
    later = trace(model, traced_by(data))
    with pytest.raises(FingerprintError, match=r"model\.safetensors has changed .* between the traces"):
        merge_traces([load_trace(traced), later])


def test_a_model_that_changes_while_it_is_traced(model, data, tmp_path, monkeypatch) -> None:
    from shape_moe.tracing.transformers_model import ModelTracer

    add = ModelTracer.add

    def changed(self, *args, **more):
        change_expert(model)
        return add(self, *args, **more)

    monkeypatch.setattr(ModelTracer, "add", changed)
    with pytest.raises(ShapeMoeError, match=r"model\.safetensors has changed while the model was traced"):
        trace(model, traced_by(data), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_shard_that_is_replaced_before_it_is_written(model, data, tmp_path, monkeypatch) -> None:
    write = writers.write_index

    def changed(*args):
        other = shutil.copyfile(model / "model.safetensors", model / "other")
        change_expert(model)
        other.replace(model / "model.safetensors")
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writers, "write_index", changed)
        with pytest.raises(ShapeMoeError, match=r"model\.safetensors has changed while it was read"):
            prune(model, tmp_path / "out", OPTIONS, data=traced_by(data))
    assert not (tmp_path / "out").exists()
    prune(model, tmp_path / "out", replace(OPTIONS, force=True), data=traced_by(data))


@pytest.mark.parametrize("verb", ["prune", "sweep"])
def test_an_interrupted_job_does_not_go_on_with_other_weights(model, data, tmp_path, monkeypatch, verb) -> None:
    def run(force: bool = False) -> None:
        if verb == "prune":
            prune(model, tmp_path / "out", replace(OPTIONS, force=force), data=traced_by(data))
        else:
            more = str(write_lines(tmp_path / "more.jsonl", examples("sorting", 40, seed=2)))
            sweep(model, None, tmp_path / "out", data=traced_by(more), force=force)

    def stop(*_args, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writers, "write_compared", stop)
        patch.setattr("shape_moe.jobs.sweep._write", stop)
        patch.setattr("shape_moe.jobs.search.Search.recommend", stop)
        run()
    change_expert(model)
    with pytest.raises(UsageError, match=r"a run whose input .*model\.safetensors has changed .* since.*--force"):
        run()
    assert not (tmp_path / "out").exists()
    if verb == "prune":
        run(force=True)
        assert (tmp_path / "out" / "shape" / "manifest.json").is_file()


@pytest.mark.parametrize("what", ["model/model.safetensors", "data.jsonl", "s.json", "also.jsonl"])
def test_what_changes_while_it_is_evaluated(model, data, tmp_path, monkeypatch, what) -> None:
    also = str(write_lines(tmp_path / "also.jsonl", examples("sorting", 4, seed=3)))
    seven_of_eight().save(tmp_path / "s.json")

    def meanwhile(_run) -> str:
        (tmp_path / what).touch()
        return "judged"

    options = EvaluateOptions(also=DataOptions(also), generation=None)
    call = partial(evaluate, model, [tmp_path / "s.json"], data=traced_by(data), options=options)
    with monkeypatch.context() as patch, pytest.raises(ShapeMoeError, match=rf"{what} has changed while it was read"):
        patch.setattr(EvaluationRun, "carry_out", meanwhile)
        call()
    monkeypatch.setattr(EvaluationRun, "carry_out", lambda _run: "judged")
    assert call() == "judged"
