"""The trace job: from a file to a folder, resumable, honest about what it left out."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shape_moe.architectures.fingerprint import UNVERIFIED
from shape_moe.calibration.example_maker import AnswerOptions
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import CheckpointError, DataError, ShapeMoeError, UnsupportedModelError, UsageError
from shape_moe.jobs import session as job
from shape_moe.jobs.session import ExampleOptions, ModelSession
from shape_moe.jobs.trace import merge, trace
from shape_moe.progress import SILENT
from shape_moe.tracing.trace import Trace, load_trace, merge_traces
from shape_moe.tracing.transformers_model import ModelTracer
from shape_moe.workspace import Workspace
from support.data import write_lines
from support.fp8 import save_fp8_model
from support.interruptions import press_ctrl_c, stopped_after
from support.mxfp4 import save_mxfp4_model
from support.notes import Notes
from support.tiny_models import make_model


@pytest.fixture
def data(tmp_path):
    def write(records, name="data.jsonl"):
        return str(write_lines(tmp_path / name, records))

    return write


def options(source: str, **changes) -> ExampleOptions:
    entries = {"data": DataOptions(source), "device": "cpu", "dtype": "float32"}
    answers = {name: changes.pop(name) for name in list(changes) if name in AnswerOptions.__dataclass_fields__}
    return ExampleOptions(answers=AnswerOptions(**{"batch_size": 4, **answers}), **{**entries, **changes})


def assert_same(first, second) -> None:
    for layer, table in first.coalitions.items():
        np.testing.assert_array_equal(table.members, second.coalitions[layer].members)
        np.testing.assert_array_equal(table.counts, second.coalitions[layer].counts)
    for name in first.statistics:
        np.testing.assert_allclose(first.statistics[name], second.statistics[name], rtol=1e-9)


def test_a_trace_says_where_it_comes_from(embedded, data, tmp_path) -> None:
    source = data(examples("sorting", 12, seed=1))
    result = trace(embedded, options(source), tmp_path / "t")
    info = result.info
    assert info.fingerprint.startswith("sha256:")
    assert (info.examples, info.family, info.num_experts, info.top_k) == (12, "qwen3_moe", 32, 4)
    assert info.tokens == {"prompt": 12 * 14, "response": 12 * 9}
    assert info.source["data"] == source
    assert len(set(info.source["prompts"])) == len(info.source["records"]) == 12
    assert info.source["template"] is True
    assert info.source["template_hash"].startswith("sha256:")
    assert info.versions["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        info.versions["torch"]
    )
    assert info.canary == []
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["coalitions", "statistics.safetensors", "trace.json"]
    assert_same(result, trace(embedded, options(source)))


def test_missing_answers_are_generated_and_traced_once(embedded, data) -> None:
    """Prompt and answer go through one teacher-forced pass: the trace of the answered records is the same."""
    rows = examples("words", 6, seed=2, held_out=True)
    asked = trace(embedded, options(data([{"prompt": row["prompt"]} for row in rows]), max_new_tokens=64))
    given = trace(embedded, options(data(rows, "given.jsonl")))
    assert asked.info.tokens == given.info.tokens
    assert asked.info.source["answers_from"] == "the model"
    assert_same(asked, given)
    bare = trace(embedded, options(data([{"prompt": row["prompt"]} for row in rows]), max_new_tokens=0))
    assert bare.info.tokens["response"] == 0


def test_traces_add_up_to_the_tokens(embedded, data) -> None:
    result = trace(embedded, options(data(examples("lookup", 9, seed=1))))
    total = sum(result.info.tokens.values())
    assert result.sums("layer_tokens").tolist() == [total] * 4
    assert result.sums("tokens").sum(axis=1).tolist() == [4 * total] * 4
    assert all(table.counts[:, :2].sum() == total for table in result.coalitions.values())
    np.testing.assert_allclose(result.sums("router_probability").sum(axis=1), total)


def test_live_models_are_unverified(embedded, data) -> None:
    source = data(examples("sorting", 4, seed=1))
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    live = trace(model, options(source), tokenizer=tokenizer)
    assert live.info.fingerprint == UNVERIFIED
    assert_same(live, trace(embedded, options(source)))
    with pytest.raises(UsageError, match="needs its tokenizer"):
        trace(model, options(source))


@pytest.mark.parametrize("save", [save_mxfp4_model, save_fp8_model])
def test_quantised_experts_are_unpacked(save, tmp_path, data, embedded) -> None:
    model = save(tmp_path / "model")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(model)
    records = [{"text": "".join(chr(33 + (7 * i + j) % 90) for j in range(9))} for i in range(5)]
    result = trace(model, options(data(records), dtype="auto"))
    assert result.info.dtype == "bfloat16"
    assert result.sums("layer_tokens").tolist() == [45.0] * len(result.info.layers)


def test_other_quantisations_are_refused_by_name(checkpoint, tmp_path, data) -> None:
    import shutil

    model = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(UnsupportedModelError, match="hqq is not known here.*--trace"):
        trace(model, options(data([{"text": "a"}])))


def test_bad_records_show_before_weights_are_loaded(embedded, data, monkeypatch) -> None:
    monkeypatch.setattr(job, "load_model", lambda *_a, **_k: pytest.fail("loaded"))
    source = data([{"text": "fine"}, {"text": "x" * 600}])
    with pytest.raises(DataError, match=r"line 2: 600 tokens are more than the model's context of 512"):
        trace(embedded, options(source))


def test_skipped_records_are_counted(embedded, data) -> None:
    source = data([{"text": "fine"}, {"text": "x" * 600}, {"text": "also fine"}])
    result = trace(embedded, options(source, skip_bad=True))
    assert result.info.examples == 2
    assert len(result.info.source["skipped"]) == 1
    assert "line 2" in next(iter(result.info.source["skipped"]))
    with pytest.raises(DataError, match="No record"):
        trace(embedded, options(data([{"text": "x" * 600}]), skip_bad=True))


def test_a_failing_pass_stops_with_its_record(embedded, data, monkeypatch) -> None:
    source = data(examples("sorting", 6, seed=1))
    real = ModelTracer._forward

    def fail(self, batch, *arguments):
        if any(example.index == 3 for example in batch.examples):
            raise RuntimeError("CUDA error: something")
        return real(self, batch, *arguments)

    monkeypatch.setattr(ModelTracer, "_forward", fail)
    with pytest.raises(ShapeMoeError, match="line 4.*CUDA error"):
        trace(embedded, options(source))
    result = trace(embedded, options(source, skip_bad=True))
    assert result.info.examples == 5
    assert list(result.info.source["skipped"].values()) == ["CUDA error: something"]
    assert result.sums("layer_tokens").max() == 5 * 23


def test_token_limits_stop_the_set(embedded, data) -> None:
    result = trace(embedded, options(data(examples("sorting", 20, seed=1)), max_tokens=100))
    assert result.info.examples == 5  # 23 tokens each: the fifth passes 100
    long = trace(embedded, options(data([{"text": "x" * 600}]), tokens=TokenOptions(max_length=64)))
    assert long.info.source["truncated"] == 1
    assert long.info.tokens == {"prompt": 64, "response": 0}


def test_interrupted_traces_go_on(embedded, data, tmp_path, monkeypatch) -> None:
    source = data([{"prompt": row["prompt"]} for row in examples("sorting", 20, seed=1)])
    chosen = options(source, batch_size=2, max_new_tokens=12)
    whole = trace(embedded, chosen)
    real = ModelTracer.add
    monkeypatch.setattr(ModelTracer, "add", stopped_after(3, real, press_ctrl_c)[0])
    with pytest.raises(KeyboardInterrupt):
        trace(embedded, chosen, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    assert json.loads((tmp_path / "t.partial" / "so-far.json").read_text()) == {
        "batches": 4,
        "traced": 4,
        "skipped": {},
    }
    passes = []
    monkeypatch.setattr(ModelTracer, "add", lambda self, batch, **more: passes.append(1) or real(self, batch, **more))
    monkeypatch.setattr(job, "generate_answers", lambda *_a, **_k: pytest.fail("answered again"))
    notes = Notes()
    resumed = trace(embedded, chosen, tmp_path / "t", progress=notes)
    assert notes.said[1:] == ["4 of 12 batches already done."]
    assert len(passes) == 12 - 4  # four folds of three examples and four of two make twelve batches
    assert_same(resumed, whole)
    assert resumed.info.tokens == whole.info.tokens
    assert not (tmp_path / "t.partial").exists()
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["coalitions", "statistics.safetensors", "trace.json"]


@pytest.mark.parametrize("bad", [(), (1, 9)])
def test_a_trace_interrupted_after_every_batch_is_the_undisturbed_one_byte_for_byte(
    embedded, embedded_model, data, tmp_path, monkeypatch, bad
) -> None:
    forward, add = ModelTracer._forward, ModelTracer.add

    def fail(self, batch, *arguments):
        if any(example.index in bad for example in batch.examples):
            raise RuntimeError("broken")
        return forward(self, batch, *arguments)

    monkeypatch.setattr(ModelTracer, "_forward", fail)
    source = data([*examples("sorting", 8, seed=1), *examples("words", 6, seed=2)])

    def traced(name: str) -> Trace:
        session = ModelSession.open(embedded, options(source, batch_size=2, skip_bad=bool(bad)), None, SILENT)
        session.use(embedded_model[0])
        (tmp_path / name).mkdir(exist_ok=True)
        found = session.trace(tmp_path / name)
        found.save(tmp_path / name)
        return found

    whole, runs, broken = traced("whole"), 0, None
    while broken is None:
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(ModelTracer, "add", _stopping(add))
            broken = traced("broken")
        runs += 1
    # eight folds of one or two examples make eight batches, of which one holds nothing but the two bad ones
    assert runs == (8 if bad else 9)
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file())
    assert len(files) == 6  # the document, the statistics, and four layers' coalitions
    for file in files:
        if file.name != "trace.json":  # salted anew
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes(), file
    assert broken.info.tokens == whole.info.tokens
    assert len(broken.info.source["skipped"]) == len(whole.info.source["skipped"]) == len(bad)


def _stopping(add):
    def stopping(self, batch, **more):
        logits = add(self, batch, **more)
        press_ctrl_c()
        return logits

    return stopping


def test_another_job_does_not_take_over(embedded, data, tmp_path) -> None:
    source = data(examples("sorting", 4, seed=1))
    (tmp_path / "t.partial").mkdir()
    (tmp_path / "t.partial" / "job.json").write_text('{"digest": "other"}')
    (tmp_path / "t.partial" / "answers.json").write_text("{}")
    with pytest.raises(UsageError, match="unfinished work of another job"):
        trace(embedded, options(source), tmp_path / "t")
    trace(embedded, options(source), tmp_path / "t", force=True)
    with pytest.raises(UsageError, match="exists and is not empty"):
        trace(embedded, options(source), tmp_path / "t")


def test_edited_data_is_another_job(embedded, data, tmp_path, monkeypatch) -> None:
    """The file's name stays, its content changes: what an interrupted run left must not be mixed in."""
    source = data(examples("sorting", 8, seed=1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ModelTracer, "add", stopped_after(1, ModelTracer.add, press_ctrl_c)[0])
        trace(embedded, options(source, batch_size=2), tmp_path / "t")
    data(examples("sorting", 8, seed=2))
    with pytest.raises(UsageError, match="unfinished work of another job"):
        trace(embedded, options(source, batch_size=2), tmp_path / "t")


def test_skipped_records_are_remembered_when_a_job_goes_on(embedded, data, tmp_path, monkeypatch) -> None:
    source = data(examples("sorting", 8, seed=1))
    forward = ModelTracer._forward

    def fail(self, batch, *arguments):
        if any(example.index == 0 for example in batch.examples):
            raise RuntimeError("broken")
        return forward(self, batch, *arguments)

    monkeypatch.setattr(ModelTracer, "_forward", fail)
    chosen = options(source, batch_size=2, skip_bad=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ModelTracer, "add", stopped_after(2, ModelTracer.add, press_ctrl_c)[0])
        trace(embedded, chosen, tmp_path / "t")
    resumed = trace(embedded, chosen, tmp_path / "t")
    assert (resumed.info.examples, list(resumed.info.source["skipped"].values())) == (7, ["broken"])
    assert resumed.sums("layer_tokens").max() == 7 * 23


def test_outputs_inside_inputs_are_refused(embedded, data, tmp_path) -> None:
    source = data(examples("sorting", 4, seed=1))
    for out in (embedded, embedded / "trace", tmp_path):
        with pytest.raises(UsageError, match="overlap; choose an output beside it"):
            trace(embedded, options(source), out, force=True)
    assert not (embedded / "trace").exists()


def test_a_lock_keeps_two_runs_apart(embedded, data, tmp_path) -> None:
    source = data(examples("sorting", 4, seed=1))
    with (
        Workspace(tmp_path / "t", {"verb": "other"}),
        pytest.raises(ShapeMoeError, match="Another run is at work"),
    ):
        trace(embedded, options(source), tmp_path / "t", force=True)
    assert not (tmp_path / ".t.lock").exists()


def test_merging_folders(embedded, data, tmp_path) -> None:
    for task in ("sorting", "words"):
        trace(embedded, options(data(examples(task, 5, seed=1), f"{task}.jsonl")), tmp_path / task)
    both = merge([tmp_path / "sorting", tmp_path / "words"], tmp_path / "both", weights=[1, 3])
    direct = merge_traces([load_trace(tmp_path / "sorting"), load_trace(tmp_path / "words")], [1, 3])
    assert_same(both, direct)
    assert [entry["weight"] for entry in both.info.source["merged"]] == [1, 3]


def test_models_that_are_not_there(data, tmp_path) -> None:
    source = data([{"text": "a"}])
    with pytest.raises(CheckpointError, match="no model folder"):
        trace(tmp_path / "none", options(source))
    with pytest.raises(CheckpointError, match="hub could not provide it"):
        trace("nobody/no-such-model", options(source))
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        trace(tmp_path, options(source))


def test_models_without_tokenizer(checkpoint, data) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        trace(checkpoint("olmoe"), options(data([{"text": "a"}])))


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("max_tokens", 0), ("max_new_tokens", -1)])
def test_options_out_of_range(name, value) -> None:
    with pytest.raises(UsageError, match="at least"):
        options("data.jsonl", **{name: value})


def test_unknown_devices_and_dtypes(embedded, data) -> None:
    source = data([{"text": "abc"}])
    with pytest.raises(UsageError, match="no device 'tpu9'"):
        trace(embedded, options(source, device="tpu9"))
    with pytest.raises(UsageError, match="dtype must be one of"):
        trace(embedded, options(source, dtype="int3"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="torch sees 0 GPUs"):
            trace(embedded, options(source, device="cuda"))


def test_nan_weights_name_the_layer(tmp_path, embedded, data) -> None:
    model = make_model("qwen3_moe")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3] = float("nan")
        model.model.layers[2].mlp.gate.weight[3] += 2
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(tmp_path / "nan")
    with pytest.raises(ShapeMoeError, match="Layer 2.*not finite.*NaN"):
        trace(tmp_path / "nan", options(data([{"text": "some text to route"}])))


def test_engines_and_their_arguments(embedded, data) -> None:
    source = data([{"text": "abc"}])
    with pytest.raises(UsageError, match="no engine 'sglang'; there are stream, transformers, vllm"):
        options(source, engine="sglang")
    with pytest.raises(UsageError, match="go with --engine vllm"):
        options(source, engine_args={"tensor_parallel_size": 2})
    with pytest.raises(UsageError, match="enforce_eager is decided by the tracer"):
        trace(embedded, options(source, engine="vllm", engine_args={"enforce_eager": False}))
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    with pytest.raises(UsageError, match="loads a model from disk"):
        trace(model, options(source, engine="vllm"), tokenizer=AutoTokenizer.from_pretrained(embedded))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_engine_vllm_needs_vllm(embedded, data) -> None:
    with pytest.raises(ShapeMoeError, match=r"needs vLLM in this environment: pip install vllm"):
        trace(embedded, options(data([{"text": "abc"}]), engine="vllm"))


def test_a_trace_that_was_killed_at_its_very_end_is_taken_up(embedded, data, tmp_path, monkeypatch) -> None:
    """All is written and has its name, but job.json is still there: the same command ends well and traces nothing."""
    source, unlink = data(examples("sorting", 4, seed=1)), Path.unlink

    def stop(self, missing_ok=False):
        if self.name == "job.json":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", stop)
        trace(embedded, options(source), tmp_path / "t")
    finished = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir() if path.is_file()}
    monkeypatch.setattr(job.ModelSession, "run", lambda *_: pytest.fail("traced again"))
    assert trace(embedded, options(source), tmp_path / "t").info.examples == 4
    del finished["job.json"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir() if path.is_file()} == finished
    assert {path.name for path in tmp_path.iterdir()} == {"t", "data.jsonl"}
