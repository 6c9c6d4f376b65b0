"""From a trace to layer curves to a selection, offline and in one job with everything else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import shape_moe
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.calibration.seen_prompts import SeenPrompts
from shape_moe.errors import FingerprintError, ShapeMoeError, UsageError
from shape_moe.evaluation.keep_rate import Limit
from shape_moe.jobs import curves as job
from shape_moe.jobs.choice import ChoiceOptions
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.progress import SILENT
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.selection.layer_curves import load_curves
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.trace import load_trace
from support.data import make_examples, synthetic_trace, write_lines
from support.family_models import tiny_config, tiny_family
from support.tiny_models import save_model

METHOD = Method("replacement", "measured")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": f"{i} plus {i + 3} is", "response": f" {2 * i + 3}."} for i in range(6)]
    return write_lines(tmp_path_factory.mktemp("data") / "d.jsonl", rows)


@pytest.fixture(scope="module")
def traced(embedded, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trace") / "t"
    shape_moe.trace(embedded, DataOptions.of(data, samples=6), out)
    return out


def test_curves_are_measured_once_and_select_offline(embedded, data, traced, tmp_path) -> None:
    file = tmp_path / "curves.json"
    curves = shape_moe.measure(embedded, traced, DataOptions.of(data, samples=6), file, method=METHOD)
    assert load_curves(file) == curves
    costs = curves.costs()
    assert (costs[:, -1] == 0).all()
    assert (np.diff(costs[:, curves.counts[0] :], axis=1) <= 0).all()
    assert (costs[:, curves.counts[0]] > 0.01).all()
    chosen = shape_moe.select(traced, SelectOptions(0.5, METHOD, curves=curves))
    assert chosen.kept == 64
    assert chosen.rule == "measured"
    with pytest.raises(UsageError, match="exists"):
        shape_moe.measure(embedded, traced, DataOptions.of(data, samples=6), file, method=METHOD)


def test_layers_of_a_model_that_also_sees_are_measured(embedded, data, tmp_path) -> None:
    """Its configuration says of the vocabulary in a part of its own."""
    tokens = json.loads((embedded / "config.json").read_text())["vocab_size"]
    text = {**tiny_config("qwen3_vl_moe").text_config.to_dict(), "vocab_size": tokens}
    model = save_model(tiny_family("qwen3_vl_moe", text_config=text), tmp_path / "model")
    for file in embedded.glob("token*"):
        shutil.copy(file, model)
    examples = ExampleOptions(DataOptions.of(data, samples=6), tokens=TokenOptions(template=False))
    trace = shape_moe.trace(model, examples, tmp_path / "trace")
    costs = shape_moe.measure(model, trace, examples, method=METHOD).costs()
    assert costs.shape == (2, 9)
    assert (costs[:, 8] == 0).all()
    assert (costs[:, 1] > 1e-6).all()


def test_prune_measures_the_examples_that_it_traces(embedded, data, tmp_path) -> None:
    options = PruneOptions(SelectOptions(0.5, METHOD), judgement=None, check_logits=False)
    result = shape_moe.prune(embedded, tmp_path / "out", options, data=DataOptions.of(data, samples=6))
    curves = load_curves(result.path / "shape" / "curves.json")
    again = shape_moe.select(result.path / "shape" / "trace", SelectOptions(0.5, METHOD, curves=curves))
    assert result.selection.layers == again.layers
    assert result.selection.constraints["measured"]["tokens"] == float(np.sum(curves.tokens))


def test_examples_that_curves_were_measured_by_never_report(embedded, data, traced, tmp_path) -> None:
    rows = [{"prompt": f"{i} plus {i} is", "response": f" {2 * i}."} for i in range(20)]
    other = write_lines(tmp_path / "other.jsonl", rows)
    given = DataOptions.of(other, samples=8)
    curves = shape_moe.measure(embedded, traced, given, method=METHOD, passes=4.0)
    chosen = SelectOptions(0.75, METHOD, curves=curves)
    records = load_records(DataOptions.of(other))
    seen = SeenPrompts.of_salts(shape_moe.select(traced, chosen).seen)
    assert [record in seen for record in records] == [record in load_records(given) for record in records]
    assert seen.count(load_records(DataOptions.of(data))) == 6
    judged = JudgementOptions(general=False, minutes=None)
    options = PruneOptions(chosen, judgement=judged, check_logits=False)
    few = DataOptions.of(other, samples=4)
    result = shape_moe.prune(embedded, tmp_path / "out", options, data=few)
    assert sum(outcome.examples for outcome in result.judgement.verdict.outcomes) == 12


def test_passes_of_an_interrupted_measurement_serve_the_same_model_alone(embedded, data, traced, tmp_path) -> None:
    def curves(dtype, journal=None):
        options = ExampleOptions(DataOptions.of(data, samples=2), device="cpu", dtype=dtype)
        session = ModelSession.open(embedded, options, None, SILENT)
        maker = job.CurveMaker(session, session.calibrator, load_trace(traced), ScoreOptions(), SILENT, passes=4.0)
        maker.journal = journal
        return maker.measured(METHOD)

    wide, narrow = curves("float32", tmp_path / "passes"), curves("bfloat16")
    assert wide.sums != narrow.sums
    assert curves("bfloat16", tmp_path / "passes").sums == narrow.sums


def test_prune_from_a_trace_needs_curves(embedded, traced, tmp_path) -> None:
    with pytest.raises(UsageError, match="needs layer curves.*--curves, or start from --data"):
        shape_moe.prune(embedded, tmp_path / "out", PruneOptions(SelectOptions(0.5, METHOD)), trace=traced)


def test_where_methods_are_compared_the_rule_is_refused(embedded, data, tmp_path) -> None:
    choice = ChoiceOptions(limit=Limit("max_kl", 0.1))
    options = PruneOptions(SelectOptions(0.5, METHOD), choice=choice)
    with pytest.raises(UsageError, match="Rule measured goes by layer curves"):
        shape_moe.prune(embedded, tmp_path / "out", options, data=DataOptions.of(data, samples=6))
    with pytest.raises(UsageError, match="Rule measured goes by layer curves"):
        shape_moe.SweepOptions(methods=(METHOD,))


def test_examples_of_every_class_come_first_and_tokens_are_bounded() -> None:
    from dataclasses import replace

    examples = [replace(e, group="b" if i >= 20 else "a") for i, e in enumerate(make_examples(30))]
    chosen = job.within_reach(examples, 60)
    assert sum(len(example.tokens) for example in chosen) <= 60
    groups = [example.group for example in chosen]
    assert abs(groups.count("a") - groups.count("b")) <= 1
    assert job.within_reach(examples, 1) == [examples[0]]


@pytest.mark.parametrize("what", ["model.safetensors", "d.jsonl"])
def test_inputs_that_change_while_layers_are_measured(embedded, data, traced, tmp_path, monkeypatch, what) -> None:
    model = shutil.copytree(embedded, tmp_path / "model")
    examples = shutil.copy(data, tmp_path / "d.jsonl")
    trace = tmp_path / "t"
    shape_moe.trace(model, DataOptions.of(examples, samples=2), trace)
    changed, measured = (model / what if what.startswith("model") else examples), job.CurveMaker.measured

    def meanwhile(*arguments):
        curves = measured(*arguments)
        changed.touch()
        return curves

    monkeypatch.setattr(job.CurveMaker, "measured", meanwhile)
    with pytest.raises(ShapeMoeError, match=rf"{what} has changed while it was read"):
        shape_moe.measure(model, trace, DataOptions.of(examples, samples=2), tmp_path / "c.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "model", "t"]


def test_a_trace_of_another_model_is_refused_also_as_an_object(embedded, data) -> None:
    with pytest.raises(FingerprintError, match="The trace"):
        shape_moe.measure(embedded, synthetic_trace(seed=1), DataOptions.of(data, samples=2), method=METHOD)
