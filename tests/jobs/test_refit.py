"""The repair without training as a job: from a folder to a checkpoint, and as a Python function."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shape_moe
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.tasks import examples
from shape_moe.errors import CheckpointError, DataError, UnsupportedModelError, UsageError
from shape_moe.jobs.choice import AUTO_HELD_OUT, ChoiceOptions
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.verify import verify
from shape_moe.progress import Silent
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import load_selection
from shape_moe.tracing.token_weights import SegmentWeights
from shape_moe.tracing.trace import load_trace
from support.data import write_lines
from support.mxfp4 import save_mxfp4_model

REROUTED = SelectOptions(keep=0.25, method=Method(routing="reroute"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", examples("sorting", 120, seed=1)))


def asked(data: str, **changes) -> PruneOptions:
    traced = ExampleOptions(DataOptions(data, samples=25), answers=AnswerOptions(batch_size=8))
    judged = JudgementOptions(examples=20, general=False, minutes=None)
    entries = {"select": REROUTED, "trace": traced, "device": "cpu", "judgement": judged, "refit": "on"}
    return PruneOptions(**{**entries, **changes})


@pytest.fixture(scope="module")
def repaired(embedded, data, tmp_path_factory):
    return prune(embedded, tmp_path_factory.mktemp("repaired") / "out", asked(data))


def test_the_repaired_checkpoint_does_the_task_that_the_pruned_one_lost(
    embedded, embedded_model, data, repaired, tmp_path
) -> None:
    plain = replace(load_selection(repaired.path), refit=None)
    dense, tokenizer = embedded_model
    with shape_moe.masked(dense, plain):
        before = exact_match(dense, tokenizer, ["sorting"])["sorting"]
    model = AutoModelForCausalLM.from_pretrained(repaired.path).eval()
    after = exact_match(model, tokenizer, ["sorting"])["sorting"]
    assert after > before + 0.1
    assert repaired.logits.passed
    tried = repaired.selection.refit["tried"]
    assert [entry["rho"] for entry in tried] == [None, 0.3, 3.0, 30.0]
    best = min(tried, key=lambda entry: entry["kl"])
    assert repaired.selection.refit["rho"] == best["rho"]
    assert best["kl"] < 0.8 * tried[0]["kl"]


def test_verify_knows_that_down_projections_differ_and_compares_all_else(embedded, repaired) -> None:
    checks = verify(repaired.path, original=embedded, device="cpu")
    assert all(check.passed for check in checks)
    said = next(check.detail for check in checks if check.name == "original")
    named = json.loads((repaired.path / "shape" / "refit.json").read_text())["tensors"]
    assert f"{len(named)} down projections are as they were refitted" in said
    assert not list(repaired.path.rglob("*partial*"))
    assert "solved again by least squares" in (repaired.path / "README.md").read_text()


def test_auto_takes_a_refit_that_helps_and_leaves_one_that_cannot(embedded, data, tmp_path) -> None:
    helped = prune(embedded, tmp_path / "helped", asked(data, refit="auto", judgement=None))
    assert helped.selection.refit is not None
    whole = replace(REROUTED, keep=1.0)
    left = prune(embedded, tmp_path / "left", asked(data, refit="auto", select=whole, judgement=None))
    assert left.selection.refit is None
    assert not (left.path / "shape" / "refit.json").exists()


def test_the_streamed_model_is_refitted_like_the_one_in_memory(embedded, data, repaired, tmp_path) -> None:
    streamed = prune(embedded, tmp_path / "out", asked(data, stream=True, judgement=None))
    assert streamed.selection.layers == repaired.selection.layers
    ours, theirs = (result.selection.refit for result in (streamed, repaired))
    assert ours["digest"] == theirs["digest"]
    for one, other in zip(ours["tried"], theirs["tried"], strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3)


def test_an_interrupted_job_goes_on_and_gives_the_same(embedded, data, repaired, tmp_path, monkeypatch) -> None:
    from shape_moe.refitting import layers

    real, calls = layers.solve, []

    def solve(*arguments, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(layers, "solve", solve)
    short = asked(data, judgement=None)
    with pytest.raises(KeyboardInterrupt):
        prune(embedded, tmp_path / "out", short)
    again = prune(embedded, tmp_path / "out", short)
    assert again.selection.refit["digest"] == repaired.selection.refit["digest"]
    whole = [f.read_bytes() for f in sorted(repaired.path.glob("*.safetensors"))]
    assert [f.read_bytes() for f in sorted(again.path.glob("*.safetensors"))] == whole


def test_a_job_that_is_interrupted_after_its_refit_still_gives_the_refitted_model(
    embedded, data, tmp_path, monkeypatch
) -> None:
    from shape_moe.jobs import prune as job

    def interrupted(*_arguments) -> None:
        raise KeyboardInterrupt

    chosen = ChoiceOptions(held_out_samples=16, routings=("reroute",), keeps_gate_scale=True)
    short = asked(data, refit="auto", choice=chosen, judgement=None, check_logits=False)
    whole = prune(embedded, tmp_path / "whole", short)
    assert whole.selection.refit is not None
    with monkeypatch.context() as patched:
        patched.setattr(job, "write_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(embedded, tmp_path / "out", short)
    again = prune(embedded, tmp_path / "out", short)
    assert again.selection.refit == whole.selection.refit
    assert all(check.passed is not False for check in verify(again.path, original=embedded, device="cpu"))


def test_examples_that_a_refit_was_chosen_by_never_report_on_it(embedded, data, tmp_path) -> None:
    result = prune(embedded, tmp_path / "out", asked(data, check_logits=False))
    seen = SeenPrompts.of_salts(result.selection.seen)
    records = load_records(DataOptions(data, samples=None))
    calibrated = SeenPrompts.of_source(load_trace(result.path / "shape" / "trace").info.source)
    others = [record for record in records if record not in calibrated]
    assert seen.count(others) == AUTO_HELD_OUT


def test_layers_of_another_refit_are_not_taken_for_this_ones(embedded_model, data, repaired, tmp_path) -> None:
    plain = replace(load_selection(repaired.path), refit=None)
    shifted = {layer: [(expert + 1) % plain.num_experts for expert in ids] for layer, ids in plain.layers.items()}
    other = replace(plain, layers={layer: sorted(ids) for layer, ids in shifted.items()})
    model, tokenizer = embedded_model
    given = DataOptions(data, samples=8)

    def refitted(selection, **changes):
        entries = {"tokenizer": tokenizer, "folder": tmp_path / "layers", **changes}
        return shape_moe.refit(model, selection, entries.pop("data", given), **entries)

    first = refitted(plain)
    for selection, changes in [
        (other, {}),
        (plain, {"rho": 1.0}),
        (plain, {"data": DataOptions(data, samples=9)}),
        (plain, {"weights": SegmentWeights()}),
    ]:
        with pytest.raises(CheckpointError, match="of another refit"):
            refitted(selection, **changes)
    assert refitted(plain).digest == first.digest


def test_the_function_repairs_a_live_model_as_a_mask(embedded_model, data, repaired) -> None:
    plain = replace(load_selection(repaired.path), refit=None)
    model, tokenizer = embedded_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = shape_moe.refit(model, plain, DataOptions(data, samples=25), tokenizer=tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with shape_moe.masked(model, plain):
        pruned = exact_match(model, tokenizer, ["sorting"])["sorting"]
    with shape_moe.masked(model, plain, weights=found.weights):
        assert exact_match(model, tokenizer, ["sorting"])["sorting"] > pruned + 0.1
    assert f"{found.tokens_per_unknown:.2g} tokens for every unknown" in found.lines()[0]


class Notes(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def test_auto_says_when_it_has_no_examples_to_refit_by(embedded, data, repaired, tmp_path) -> None:
    few = write_lines(tmp_path / "few.jsonl", examples("sorting", 6, seed=1))
    plain = replace(load_selection(repaired.path), refit=None)
    bare = {"judgement": None, "refit": "auto", "check_logits": False}
    for number, (options, more) in enumerate(
        [(asked(str(few), **bare), {}), (asked(data, select=None, trace=None, **bare), {"selection": plain})]
    ):
        notes = Notes()
        result = prune(embedded, tmp_path / f"out{number}", options, progress=notes, **more)
        assert result.selection.refit is None
        assert any("a refit needs the examples that calibrate" in text for text in notes.told)
    with pytest.raises(DataError, match="too few to calibrate with some and judge by others"):
        prune(embedded, tmp_path / "on", asked(str(few), **{**bare, "refit": "on"}))


def test_weights_are_written_with_the_selection_that_brings_them_and_never_claimed_without(
    embedded, embedded_model, data, repaired, tmp_path
) -> None:
    model, tokenizer = embedded_model
    bare = asked(data, select=None, trace=None, judgement=None, refit="off", check_logits=False)
    plain = replace(load_selection(repaired.path), refit=None)
    found = shape_moe.refit(model, plain, DataOptions(data, samples=25), tokenizer=tokenizer)
    written = prune(embedded, tmp_path / "with", bare, selection=found.applied_to(plain))
    assert all(check.passed is not False for check in verify(written.path, original=embedded, device="cpu"))
    assert json.loads((written.path / "shape" / "refit.json").read_text())["tensors"]
    left = prune(embedded, tmp_path / "without", bare, selection=repaired.path)
    assert left.selection.refit is None
    assert any("holds no weights" in note for note in left.notes)
    assert all(check.passed is not False for check in verify(left.path, original=embedded, device="cpu"))


def test_every_model_of_a_series_is_refitted(embedded, data, tmp_path) -> None:
    result = shape_moe.prune_series(
        embedded, tmp_path / "series", [0.4, 0.25], asked(data, judgement=None, check_logits=False)
    )
    for model in result.models:
        assert model.selection.refit is not None
        assert all(check.passed is not False for check in verify(model.path, original=embedded, device="cpu"))
    assert not list(result.path.rglob("*partial*"))


def test_what_cannot_be_refitted_is_refused_before_any_work(embedded, data, repaired, tmp_path) -> None:
    with pytest.raises(UsageError, match="on, off or auto, not 'yes'"):
        prune(embedded, tmp_path / "out", asked(data, refit="yes"))
    without = asked(data, select=None, trace=None)
    with pytest.raises(UsageError, match="start from them"):
        prune(embedded, tmp_path / "out", without, selection=load_selection(repaired.path))
    with pytest.raises(UsageError, match="rho must be a positive number"):
        shape_moe.refit(embedded, load_selection(repaired.path), data, rho=0)
    quantised = save_mxfp4_model(tmp_path / "mxfp4")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(quantised)
    with pytest.raises(UnsupportedModelError, match="MXFP4"):
        prune(quantised, tmp_path / "out", asked(data, select=SelectOptions(keep=0.5)))
    assert not (tmp_path / "out").exists()
