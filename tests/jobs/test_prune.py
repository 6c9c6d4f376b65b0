"""The whole job: what it writes, what it checks, what it refuses, and that it can be interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shape_moe.architectures import loading
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.tasks import examples
from shape_moe.errors import CheckpointError, FingerprintError, ShapeMoeError, UsageError
from shape_moe.jobs import prune as job
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import select
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.jobs.verify import verify
from shape_moe.pruning import shards, writers
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import load_selection
from shape_moe.tracing.trace import load_trace
from support.data import write_lines
from support.interruptions import stopped_after
from support.selections import seven_of_eight


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_lines(tmp_path_factory.mktemp("data") / "sorting.jsonl", examples("sorting", 25, seed=1)))


@pytest.fixture(scope="module")
def traced(embedded, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace") / "t"
    trace(embedded, ExampleOptions(data=DataOptions(data), device="cpu"), folder)
    return folder


def options(keep: float = 0.6, data: str | None = None, **changes) -> PruneOptions:
    entries = {
        "select": SelectOptions(keep=keep),
        "trace": ExampleOptions(data=DataOptions(data), device="cpu") if data else None,
        "device": "cpu",
    }
    return PruneOptions(**{**entries, **changes})


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_command_gives_a_smaller_model_that_does_the_task(embedded, data, tmp_path) -> None:
    before = contents(embedded)
    result = prune(embedded, tmp_path / "out", options(0.8, data))
    assert result.selection.kept == 102
    assert result.logits.passed
    assert result.logits.top1_agreement == 1
    assert result.bytes_after / result.bytes_before < 0.82
    on_disk = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert result.bytes_after < on_disk < result.bytes_after + 65536
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exact_match(model, tokenizer, ["sorting"])["sorting"] > 0.9
    assert contents(embedded) == before
    assert not (tmp_path / "out.partial").exists()
    names = set(contents(tmp_path / "out"))
    assert {"config.json", "README.md", "tokenizer.json", "generation_config.json", "modeling_shape_moe.py"} <= names
    assert {"shape/selection.json", "shape/canary.json", "shape/manifest.json", "shape/trace/trace.json"} <= names
    assert not any("partial" in name or "job" in name or name.endswith(".tmp") for name in names)
    assert all(check.passed for check in verify(tmp_path / "out", original=embedded, device="cpu"))


def test_entering_half_way_gives_the_same_checkpoint(embedded, data, traced, tmp_path) -> None:
    whole = prune(embedded, tmp_path / "whole", options(0.6, data))
    from_trace = prune(embedded, tmp_path / "trace", options(0.6), trace=traced)
    selection = select(traced, SelectOptions(keep=0.6))
    selection.save(tmp_path / "selection.json")
    by_file = prune(embedded, tmp_path / "file", options(select=None), selection=tmp_path / "selection.json")
    assert whole.selection.layers == from_trace.selection.layers == by_file.selection.layers
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "trace", "file")]
    assert weights[0] == weights[1] == weights[2]
    canaries = [
        json.loads((tmp_path / name / "shape" / "canary.json").read_text()) for name in ("whole", "trace", "file")
    ]
    assert canaries[0] == canaries[1] == canaries[2]


def test_tables_of_values_can_be_pruned_by(embedded, traced, tmp_path) -> None:
    score_trace(load_trace(traced), "shape").table().write_csv(tmp_path / "values.csv")
    selection = select(tmp_path / "values.csv", SelectOptions(keep=0.6))
    assert selection.fingerprint is None
    result = prune(embedded, tmp_path / "out", options(select=None), selection=selection)
    assert result.selection.layers == select(traced, SelectOptions(keep=0.6)).layers
    assert load_selection(tmp_path / "out").fingerprint.startswith("sha256:")


def test_stock_targets_load_anywhere(embedded, traced, tmp_path) -> None:
    chosen = SelectOptions(keep=0.5, method=Method(routing="reroute", target="stock"))
    result = prune(embedded, tmp_path / "out", options(select=chosen), trace=traced)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_local_experts"] == 16
    assert not (tmp_path / "out" / "modeling_shape_moe.py").exists()
    assert result.selection.equal_count == 16
    assert all(check.passed for check in verify(tmp_path / "out", device="cpu"))


def test_canary_answers_are_those_of_the_masked_original(embedded, traced, tmp_path) -> None:
    import shape_moe

    prune(embedded, tmp_path / "out", options(0.6), trace=traced)
    document = json.loads((tmp_path / "out" / "shape" / "canary.json").read_text())
    assert len(document["sequences"]) == 16
    model = AutoModelForCausalLM.from_pretrained(embedded).eval()
    first = document["sequences"][0]
    with shape_moe.masked(model, load_selection(tmp_path / "out")), torch.no_grad():
        logprobs = model(input_ids=torch.tensor([first["tokens"]])).logits[0].float().log_softmax(-1)
    best = logprobs.topk(20)
    assert first["top_ids"] == best.indices.tolist()
    assert torch.allclose(torch.tensor(first["top_logprobs"]), best.values, atol=2e-6)


def test_foreign_code_and_folders_stay_behind(embedded, traced, tmp_path) -> None:
    source = shutil.copytree(embedded, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (source / "config.json").write_text(json.dumps(config))
    for name in ("modeling_evil.py", "notes.md", "optimizer.bin", "LICENSE", "training_args.json"):
        (source / name).write_text("content")
    (source / "original").mkdir()
    (source / "original" / "tokenizer.json").write_text("{}")
    prune(source, tmp_path / "out", options(0.6), trace=traced)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "LICENSE" in names
    assert not names & {
        "modeling_evil.py",
        "notes.md",
        "optimizer.bin",
        "original",
        "training.json",
        "training_args.json",
    }
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["auto_map"] == {"AutoModelForCausalLM": "modeling_shape_moe.ShapeQwen3MoeForCausalLM"}


def test_traces_of_other_models_are_refused(embedded, traced, tmp_path) -> None:
    """A fine-tune of the same shape is another model: its routers differ."""
    model = AutoModelForCausalLM.from_pretrained(embedded)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] += 0.125
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(tmp_path / "tuned")
    with pytest.raises(FingerprintError, match="made from another model: its routers differ"):
        prune(tmp_path / "tuned", tmp_path / "out", options(0.6), trace=traced)
    selection = select(traced, SelectOptions(keep=0.6))
    with pytest.raises(FingerprintError, match="The selection was made from another model"):
        prune(tmp_path / "tuned", tmp_path / "out", options(select=None), selection=selection)
    unknown = replace(selection, fingerprint="unverified")
    with pytest.raises(FingerprintError, match="use --force"):
        prune(embedded, tmp_path / "out", options(select=None), selection=unknown)
    prune(embedded, tmp_path / "out", options(select=None, force=True), selection=unknown)


def test_requantised_copies_share_the_fingerprint(embedded, traced, tmp_path) -> None:
    """Routers decide: the same model in other shards, or with other dtypes elsewhere, takes the same trace."""
    model = AutoModelForCausalLM.from_pretrained(embedded)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(tmp_path / "shards")
    result = prune(tmp_path / "shards", tmp_path / "out", options(0.6), trace=traced)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert result.logits.passed
    assert all(check.passed for check in verify(tmp_path / "out", original=tmp_path / "shards", device="cpu"))


def test_damaged_models_are_refused(embedded, traced, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    with shards[2].open("r+b") as stream:
        stream.truncate(shards[2].stat().st_size - 7)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        prune(tmp_path / "shards", tmp_path / "out", options(0.6), trace=traced)
    shards[2].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[2].name} is missing"):
        prune(tmp_path / "shards", tmp_path / "out", options(0.6), trace=traced)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_index_files_cannot_point_elsewhere(embedded, traced, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = next(iter(document["weight_map"]))
    document["weight_map"][name] = "../../etc/passwd"
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="points outside the model folder"):
        open_snapshot(tmp_path / "shards")


def test_wrong_keep_rates_and_infeasible_budgets(embedded, traced, tmp_path) -> None:
    for keep in (0, 1.5, -1):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            prune(embedded, tmp_path / "out", options(keep), trace=traced)
    chosen = SelectOptions(keep=0.55, method=Method(routing="reroute", target="stock"))
    with pytest.raises(UsageError, match="equal counts in every layer.*--allow-rounding"):
        prune(embedded, tmp_path / "out", options(select=chosen), trace=traced)
    with pytest.raises(UsageError, match="floor of 4"):
        low = SelectOptions(keep=0.05, method=Method(routing="reroute"))
        prune(embedded, tmp_path / "out", options(select=low), trace=traced)
    assert not (tmp_path / "out").exists()


def test_exactly_one_way_in(embedded, traced, data, tmp_path) -> None:
    with pytest.raises(UsageError, match="data .--data. only judge: leave them out without judgement"):
        prune(embedded, tmp_path / "out", options(0.6, data, judgement=None), trace=traced)
    with pytest.raises(UsageError, match="Give calibration data"):
        prune(embedded, tmp_path / "out", options(0.6))
    with pytest.raises(UsageError, match="--trace and --selection exclude each other"):
        prune(embedded, tmp_path / "out", options(), trace=traced, selection=seven_of_eight())


def test_outputs_are_not_overwritten_without_force(embedded, traced, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty; choose another output, or replace it with --force"):
        prune(embedded, tmp_path / "out", options(0.6), trace=traced)
    assert contents(tmp_path / "out") == {"precious.txt": b"mine"}
    with pytest.raises(UsageError, match="holds no result of this tool, so --force does not replace it"):
        prune(embedded, tmp_path / "out", options(0.6, force=True), trace=traced)
    assert contents(tmp_path / "out") == {"precious.txt": b"mine"}
    prune(embedded, tmp_path / "ours", options(0.8), trace=traced)
    with pytest.raises(UsageError, match="not empty; choose another output"):
        prune(embedded, tmp_path / "ours", options(0.6), trace=traced)
    prune(embedded, tmp_path / "ours", options(0.6, force=True), trace=traced)
    assert load_selection(tmp_path / "ours").kept == 77
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "out"]


def test_a_failed_replacement_leaves_the_old_result(embedded, traced, tmp_path, monkeypatch) -> None:
    prune(embedded, tmp_path / "out", options(0.8), trace=traced)
    before = contents(tmp_path / "out")

    def fail(*_args):
        raise ShapeMoeError("stop")

    monkeypatch.setattr(writers, "write_index", fail)
    with pytest.raises(ShapeMoeError, match="stop"):
        prune(embedded, tmp_path / "out", options(0.6, force=True), trace=traced)
    assert contents(tmp_path / "out") == before


def test_inputs_are_never_touched(embedded, traced, tmp_path) -> None:
    for out in (embedded, embedded / "smaller", traced, traced / "smaller"):
        with pytest.raises(UsageError, match="overlap; choose an output beside it"):
            prune(embedded, out, options(0.6, force=True), trace=traced)
    selection = select(traced, SelectOptions(keep=0.6))
    selection.save(tmp_path / "s.json")
    with pytest.raises(UsageError, match="overlap"):
        prune(embedded, tmp_path, options(select=None, force=True), selection=tmp_path / "s.json")


def test_damaged_shards_of_an_interrupted_job_are_written_again(embedded, traced, tmp_path, monkeypatch) -> None:
    def fail(*_args):
        raise ShapeMoeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(writers, "write_index", fail)
        with pytest.raises(ShapeMoeError, match="stop"):
            prune(embedded, tmp_path / "out", options(0.6), trace=traced)
    shard = next((tmp_path / "out.partial").glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-100] ^= 255
    shard.write_bytes(damaged)
    prune(embedded, tmp_path / "out", options(0.6), trace=traced)
    assert all(check.passed for check in verify(tmp_path / "out", original=embedded, device="cpu"))


def test_too_little_disk_is_noticed_first(embedded, traced, tmp_path, monkeypatch) -> None:
    """To the byte: what will be written, and 64 MiB to spare, less what an interrupted run has written."""
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    for keep in (0.25, 0.75):
        quick = options(keep, check_logits=False)
        needed = prune(embedded, tmp_path / f"measured-{keep}", quick, trace=traced).bytes_after + 64 * 2**20
        monkeypatch.setattr(job.shutil, "disk_usage", lambda _path, free=needed - 1: usage(10**9, 10**9, free))
        with pytest.raises(
            ShapeMoeError, match=r"needs about 6\d\.\d\d MiB, but only 6\d\.\d\d MiB are free on the disk"
        ):
            prune(embedded, tmp_path / f"out-{keep}", quick, trace=traced)
        assert not (tmp_path / f"out-{keep}").exists()
        monkeypatch.setattr(job.shutil, "disk_usage", lambda _path, free=needed: usage(10**9, 10**9, free))
        prune(embedded, tmp_path / f"out-{keep}", quick, trace=traced)
        monkeypatch.undo()


def test_interrupted_jobs_go_on_where_they_stopped(embedded, data, tmp_path, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(embedded).save_pretrained(tmp_path / "shards")
    expected = prune(tmp_path / "shards", tmp_path / "expected", options(0.6, data))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_shard", stopped_after(2, shards.write_shard)[0])
        prune(tmp_path / "shards", tmp_path / "out", options(0.6, data))
    assert not (tmp_path / "out").exists()
    kept = contents(tmp_path / "out.partial")
    assert "shape/trace/trace.json" in kept
    assert sum(name.endswith(".safetensors") and "shape" not in name for name in kept) >= 2
    monkeypatch.setattr(job.ModelSession, "run", lambda *_: pytest.fail("traced again"))
    with pytest.raises(UsageError, match="unfinished work of another job"):
        prune(tmp_path / "shards", tmp_path / "out", options(0.8, data))
    resumed = prune(tmp_path / "shards", tmp_path / "out", options(0.6, data))
    assert resumed.selection == expected.selection
    first, second = contents(tmp_path / "expected"), contents(tmp_path / "out")
    assert first.keys() == second.keys()
    # prompts are hashed with a salt of the trace's own
    salted = ["shape/manifest.json", "shape/selection.json", "shape/trace/trace.json"]
    assert [name for name in first if first[name] != second[name]] == salted
    selections = [json.loads(found[salted[1]]) for found in (first, second)]
    for document in selections:
        assert [len(hashes) for hashes in document.pop("seen").values()] == [25]
    assert selections[0] == selections[1]
    traces = [json.loads(found[salted[2]]) for found in (first, second)]
    for document in traces:
        del document["source"]["salt"], document["source"]["prompts"]
    assert traces[0] == traces[1]


def test_a_wrong_checkpoint_is_not_given_its_name(embedded, traced, tmp_path, monkeypatch) -> None:
    """Were the config to describe other experts than those on disk, the logit check would stop the job."""
    real = writers.pruned_config

    def shifted(*args):
        config = real(*args)
        layers = config["shape_pruning"]["layers"]
        layers["0"] = [(i + 1) % 32 for i in layers["0"]]
        return config

    monkeypatch.setattr(writers, "pruned_config", shifted)
    with pytest.raises(CheckpointError, match="logits differ from the masked original's"):
        prune(embedded, tmp_path / "out", options(0.6), trace=traced)
    assert not (tmp_path / "out").exists()


def test_the_reason_for_a_missing_logit_check_is_told(embedded, traced, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loading, "host_memory", lambda: 5 * 2**20)
    result = prune(embedded, tmp_path / "out", options(0.6), trace=traced)
    assert result.logits is None
    assert "the model needs 6.47 MiB and 5.00 MiB are free" in result.logits_skipped
    assert any("Logits were not compared" in note for note in result.notes)
    checks = {check.name: check for check in verify(tmp_path / "out", device="cpu")}
    assert checks["canary"].passed is None
    quick = prune(embedded, tmp_path / "quick", options(0.6, check_logits=False), trace=traced)
    assert quick.logits_skipped == "--no-logits was given"
