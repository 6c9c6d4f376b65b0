"""GGUF files as models: inspected, traced, pruned, and read with their own tokenizer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.gguf_file import read_gguf
from shape_moe.architectures.loading import load_tokenizer
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.errors import CheckpointError, FingerprintError, UnsupportedModelError, UsageError
from shape_moe.jobs.inspect import inspect_model
from shape_moe.jobs.judgement import JudgementOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import select
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import open_trace, trace
from shape_moe.jobs.verify import verify
from shape_moe.progress import SILENT
from shape_moe.scoring.scores import score_trace
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import open_selection
from support.data import write_lines
from support.gguf_files import TEMPLATE, chats, gguf_model, metadata_of, save_gguf, to_gguf, write_gguf
from support.selections import random_selection
from support.tiny_models import save_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", chats(12)))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(gguf_model("qwen3_moe"), tmp_path_factory.mktemp("gguf") / "model.gguf")


def example_options(data: str, **tokens: str) -> ExampleOptions:
    return ExampleOptions(DataOptions(data), TokenOptions(**tokens), device="cpu")


def test_inspect_says_what_the_file_holds(file: Path) -> None:
    found = inspect_model(file)
    assert found.size.total == sum(t.size for t in found.snapshot.tensors.values())
    assert found.size.experts == 3 * 16 * 3 * 32 * 24 * 4
    assert found.size.num_experts == 48
    assert found.size.expert_values == 3 * 16 * 3 * 32 * 24


def test_the_tokenizer_of_the_metadata(file: Path) -> None:
    tokenizer = load_tokenizer(file)
    text = "what is the 12\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[:9] == ["w", "h", "a", "t", "Ġ", "i", "s", "Ġ", "th"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("</s>").input_ids == [2]
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("way", "text", "pieces"),
    [
        ("glm4", "ab 12345 x", ["ab", "Ġ", "123", "45", "Ġx"]),
        ("deepseek-v3", "ab 12345 日x!y", ["ab", "Ġ", "123", "45", "Ġ", "æĹ¥", "x", "!y"]),
        ("qwen2", "ab 12", ["ab", "Ġ", "1", "2"]),
        ("gpt-2", "ab 12345", ["ab", "Ġ12345"]),
    ],
)
def test_text_is_split_as_the_file_says(way: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    model = gguf_model("qwen3_moe")
    found = write_gguf(tmp_path / "m.gguf", "qwen3moe", metadata_of(model.config), to_gguf(model), pre=way)
    splitter = load_tokenizer(found).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == pieces


def test_tokenizers_that_would_read_other_tokens_are_refused(tmp_path: Path) -> None:
    model = gguf_model("qwen3_moe")
    metadata, tensors = metadata_of(model.config), to_gguf(model)
    with pytest.raises(UnsupportedModelError, match=r"the way 'unheard'.*--tokenizer DIR"):
        load_tokenizer(write_gguf(tmp_path / "a.gguf", "qwen3moe", metadata, tensors, pre="unheard"))
    with pytest.raises(CheckpointError, match=r"no tokenizer in its metadata.*--tokenizer DIR"):
        load_tokenizer(write_gguf(tmp_path / "b.gguf", "qwen3moe", metadata, tensors, tokenizer=False))


def test_a_trace_of_the_file_is_the_trace_of_the_model(file: Path, data: str, tmp_path: Path) -> None:
    folder = save_model(gguf_model("qwen3_moe"), tmp_path / "model")
    load_tokenizer(file).save_pretrained(folder)
    found = trace(file, example_options(data), tmp_path / "t", force=False)
    expected = trace(folder, example_options(data))
    assert found.info.tokens == expected.info.tokens
    assert found.info.examples == 12
    assert np.array_equal(score_trace(found, "shape").values, score_trace(expected, "shape").values)
    assert found.statistics.keys() == expected.statistics.keys()
    for name in found.statistics:
        assert np.allclose(found.statistics[name], expected.statistics[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_file_is_traced_layer_by_layer(family: str, data: str, tmp_path: Path) -> None:
    found = save_gguf(gguf_model(family), tmp_path / "m.gguf")
    whole = trace(found, replace(example_options(data), engine="transformers"))
    layers = trace(found, replace(example_options(data), engine="stream"))
    assert whole.statistics.keys() == layers.statistics.keys()
    assert all(np.array_equal(whole.statistics[name], layers.statistics[name]) for name in whole.statistics)


def test_another_tokenizer_is_read_from_its_folder(file: Path, data: str, tmp_path: Path) -> None:
    model = gguf_model("qwen3_moe")
    bare = write_gguf(tmp_path / "m.gguf", "qwen3moe", metadata_of(model.config), to_gguf(model), tokenizer=False)
    load_tokenizer(file).save_pretrained(tmp_path / "tokenizer")
    found = trace(bare, example_options(data, tokenizer=str(tmp_path / "tokenizer")))
    assert found.info.tokens == trace(file, example_options(data)).info.tokens
    with pytest.raises(UsageError, match="no folder .*nowhere"):
        trace(bare, example_options(data, tokenizer=str(tmp_path / "nowhere")))
    assert found.info.source["tokenizer"] == str(tmp_path / "tokenizer")


QUICK = JudgementOptions(general=False, answers=1)


def test_without_options_a_file_is_pruned_with_equal_counts(file: Path, data: str, tmp_path: Path) -> None:
    result = prune(file, tmp_path / "a.gguf", PruneOptions(device="cpu", judgement=QUICK), data=data, keep=0.6)
    assert result.path == tmp_path / "a.gguf"
    assert result.selection.routing == "reroute"
    assert (result.selection.equal_count, result.selection.kept) == (9, 27)
    assert result.logits is not None
    assert result.logits.passed


def test_a_trace_and_a_selection_enter_half_way(file: Path, data: str, tmp_path: Path) -> None:
    trace(file, example_options(data), tmp_path / "t")
    method = Method("reap", "uniform", "reroute", "stock")
    chosen = select(tmp_path / "t", SelectOptions(keep=0.5, method=method))
    chosen.save(tmp_path / "s.json")
    options = PruneOptions(device="cpu", judgement=None, check_logits=False)
    first = prune(file, tmp_path / "a.gguf", options, selection=tmp_path / "s.json")
    by_trace = PruneOptions(SelectOptions(keep=0.5, method=method), device="cpu", judgement=None, check_logits=False)
    prune(file, tmp_path / "b.gguf", by_trace, trace=tmp_path / "t")
    assert first.selection.layers == chosen.layers
    assert (tmp_path / "a.gguf").read_bytes()[:100] == (tmp_path / "b.gguf").read_bytes()[:100]


def test_a_model_that_is_not_good_enough_has_another_name(file: Path, data: str, tmp_path: Path) -> None:
    strict = JudgementOptions(general=False, answers=1, require="safe")
    result = prune(file, tmp_path / "a.gguf", PruneOptions(device="cpu", judgement=strict), data=data, keep=0.25)
    assert result.rejected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.rejected.gguf", "a.shape.rejected"]


def test_an_interrupted_job_leaves_no_file_and_goes_on(file: Path, data: str, tmp_path: Path, monkeypatch) -> None:
    options = PruneOptions(device="cpu", judgement=None)
    monkeypatch.setattr("shape_moe.jobs.pruned_model.check_logits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(file, tmp_path / "a.gguf", options, data=data, keep=0.75)
    assert not (tmp_path / "a.gguf").exists()
    monkeypatch.undo()
    result = prune(file, tmp_path / "a.gguf", options, data=data, keep=0.75)
    other = prune(file, tmp_path / "b.gguf", options, data=data, keep=0.75)
    first, second = read_gguf(result.path), read_gguf(other.path)
    salted = "shape_moe.selection"  # names the examples by hashes of which each trace has its own
    assert all(entry.raw == second.entries[key].raw for key, entry in first.entries.items() if key != salted)
    begin = [header.data_start - header.file.stat().st_size for header in (first, second)]
    assert result.path.read_bytes()[begin[0] :] == other.path.read_bytes()[begin[1] :]
    assert result.selection.layers == other.selection.layers
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "a.shape", "b.gguf", "b.shape"]


def test_a_pruned_file_is_verified(file: Path, data: str, tmp_path: Path) -> None:
    out = prune(file, tmp_path / "a.gguf", PruneOptions(device="cpu", judgement=None), data=data, keep=0.75).path
    checks = {check.name: check for check in verify(out, original=file, device="cpu")}
    assert list(checks) == ["files", "selection and metadata", "tokenizer", "original", "canary"]
    assert all(check.passed for check in checks.values()), checks
    assert "36 of 48 experts, 12 in every layer" in checks["selection and metadata"].detail
    moved = tmp_path / "elsewhere.gguf"
    moved.write_bytes(out.read_bytes())
    assert [check.passed for check in verify(moved, original=file, device="cpu")] == [True, True, True, True, None]
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    moved.write_bytes(content)
    assert [check.passed for check in verify(moved, original=file, device="cpu")] == [False, True, True, False, None]
    renamed = out.read_bytes().replace(b"pruned to 12 of 16", b"pruned to 12 of 99")
    moved.write_bytes(renamed)
    assert [check.passed for check in verify(moved, original=file, device="cpu")] == [True, True, True, False, None]
    out.write_bytes(renamed)
    assert [check.passed for check in verify(out, device="cpu")] == [False, True, True, True]
    with pytest.raises(CheckpointError, match="not written by shape-moe"):
        verify(file)
    with pytest.raises(UsageError, match="leave --endpoint out"):
        verify(out, endpoint="http://localhost:1")


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3_moe", "float32"), ("mixtral", "bfloat16"), ("gpt_oss", "float32")]
)
def test_what_was_made_from_the_folder_fits_the_file(family: str, dtype: str, data: str, tmp_path: Path) -> None:
    live = gguf_model(family, dtype=getattr(torch, dtype))
    folder, file = save_model(live, tmp_path / "model"), save_gguf(live, tmp_path / "m.gguf")
    load_tokenizer(file).save_pretrained(folder)
    trace(folder, example_options(data), tmp_path / "t")
    method = Method("reap", "uniform", "reroute", "stock")
    chosen = select(tmp_path / "t", SelectOptions(keep=0.5, method=method))
    options = PruneOptions(device="cpu", judgement=None)
    result = prune(file, tmp_path / "a.gguf", options, selection=chosen)
    assert result.selection.layers == chosen.layers
    assert family != "mixtral" or any("router rows" in note and note.endswith("are equal.") for note in result.notes), (
        result.notes
    )
    by_trace = PruneOptions(SelectOptions(keep=0.5, method=method), device="cpu", judgement=None)
    assert prune(file, tmp_path / "b.gguf", by_trace, trace=tmp_path / "t").selection.layers == chosen.layers


def test_a_file_is_recognised_when_the_traced_model_is_gone(data: str, tmp_path: Path) -> None:
    live = gguf_model("gpt_oss", dtype=torch.bfloat16)
    folder, tensors = save_model(live, tmp_path / "model"), to_gguf(live)
    metadata = metadata_of(live.config)
    file = write_gguf(tmp_path / "f32.gguf", "gpt-oss", metadata, tensors)
    load_tokenizer(file).save_pretrained(folder)
    made = trace(folder, example_options(data), tmp_path / "t")
    assert made.info.routers is not None
    assert {(layer, part) for layer, parts in made.info.routers.items() for part in parts} == {
        (str(layer), part) for layer in made.info.layers for part in ("router.weight", "router.bias")
    }
    assert {entry["stored"] for parts in made.info.routers.values() for entry in parts.values()} == {"BF16"}
    chosen = select(made, SelectOptions(keep=0.5, method=Method("reap", "uniform", "reroute", "stock")))
    half = save_model(live.half(), tmp_path / "half")
    shutil.rmtree(folder)
    routers = [name for name in tensors if "ffn_gate_inp.weight" in name]
    rounded = {name: gguf.quants.quantize(tensors[name], GGMLQuantizationType.F16) for name in routers}
    small = write_gguf(tmp_path / "f16.gguf", "gpt-oss", metadata, {**tensors, **rounded})
    for model, close in ((file, "are equal."), (small, "once rounded to F16."), (half, "once rounded to F16.")):
        assert open_selection(chosen, open_snapshot(model)).warnings[-1].endswith(close)
        assert open_trace(tmp_path / "t", open_snapshot(model), SILENT).info == made.info
    moved = {**tensors, routers[1]: tensors[routers[1]] * np.float32(1.01)}
    tuned = open_snapshot(write_gguf(tmp_path / "tuned.gguf", "gpt-oss", metadata, moved))
    with pytest.raises(FingerprintError, match=rf"another model \({folder}\): the router rows of layer 1 differ"):
        open_selection(chosen, tuned)
    foreign = open_snapshot(save_gguf(gguf_model("qwen3_moe"), tmp_path / "q.gguf"))
    with pytest.raises(FingerprintError, match=rf"The trace .* another model \({folder}\): layers or experts differ"):
        open_trace(tmp_path / "t", foreign, SILENT)
    with pytest.raises(FingerprintError, match="cannot be opened"):
        open_selection(replace(chosen, routers=None), tuned)


def test_the_same_routers_under_another_configuration_are_another_model(data: str, tmp_path: Path) -> None:
    live = gguf_model("qwen3_moe")
    file = save_gguf(live, tmp_path / "m.gguf")
    chosen = select(trace(file, example_options(data)), SelectOptions(keep=0.5))
    live.config.norm_topk_prob = not live.config.norm_topk_prob
    other = open_snapshot(save_model(live, tmp_path / "model"))
    with pytest.raises(FingerprintError, match="or the configuration of their routing"):
        open_selection(chosen, other)


def test_routers_that_were_rounded_are_close_and_others_are_refused(data: str, tmp_path: Path) -> None:
    live = gguf_model("qwen3_moe")
    folder = save_model(live, tmp_path / "model")
    tensors, metadata = to_gguf(live), metadata_of(live.config)
    routers = [name for name in tensors if "ffn_gate_inp" in name]
    half = {name: gguf.quants.quantize(tensors[name], GGMLQuantizationType.F16) for name in routers}
    rounded = write_gguf(tmp_path / "f16.gguf", "qwen3moe", metadata, {**tensors, **half})
    assert read_gguf(rounded).tensors[routers[0]].type_name == "F16"
    whole = open_snapshot(folder)
    chosen = replace(random_selection(whole, "reroute", "equal"), fingerprint=fingerprint(whole), model=str(folder))
    told = open_selection(chosen, open_snapshot(rounded)).warnings[-1]
    assert float(told.split("within ")[1].split()[0]) == pytest.approx(2.0**-11, rel=0.2)
    other = {**tensors, routers[1]: tensors[routers[1]] * np.float32(1.001)}
    tuned = open_snapshot(write_gguf(tmp_path / "tuned.gguf", "qwen3moe", metadata, other))
    with pytest.raises(FingerprintError, match=r"another model.*differ by 1\.0e-03.*layer 1"):
        open_selection(chosen, tuned)
    with pytest.raises(FingerprintError, match="cannot be opened"):
        open_selection(replace(chosen, model=str(tmp_path / "gone")), tuned)
    with pytest.raises(FingerprintError, match="layers or experts differ"):
        another = save_gguf(gguf_model("qwen3_moe", num_experts=32), tmp_path / "b.gguf")
        open_selection(chosen, open_snapshot(another))
    save_model(gguf_model("qwen3_moe", seed=1), folder)
    with pytest.raises(FingerprintError, match="have changed since"):
        open_selection(chosen, tuned)
