"""Every family is traced, cut, written and loaded again as its original is, whatever names and layouts it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from shape_moe.architectures.layered_model import LayeredModel
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.batches import make_batch
from shape_moe.errors import UnsupportedModelError, UsageError
from shape_moe.progress import Silent
from shape_moe.pruning.masks import masked
from shape_moe.pruning.writers import SafetensorsFolder
from shape_moe.tracing.transformers_model import ModelTracer
from support.data import make_examples
from support.family_models import EXPERTS, TINY, TinyFamily, tiny_family
from support.family_trace import NAMES, naive
from support.masked_by_hand import at_trained_scale, dropped, rerouted
from support.selections import random_selection
from support.tiny_models import random_tokens

CASES = (("stock", "reroute", "equal"), ("ragged", "reroute", "ragged"), ("ragged", "drop", "ragged"))


@pytest.mark.parametrize("name", TINY)
def test_family(name: str, tmp_path: Path) -> None:
    made, model = TINY[name], tiny_family(name)
    source = tmp_path / "model"
    model.save_pretrained(source)
    snapshot = open_snapshot(source)
    _check_facts(made, model, snapshot.moe)
    _check_trace(made, model, snapshot)
    _check_pruned(made, model, source, tmp_path)
    fused = tmp_path / "fused"
    model.save_pretrained(fused, save_original_format=False)
    if set(open_snapshot(fused).tensors) != set(snapshot.tensors):
        case = next(case for case in CASES if case[1] in made.routings)
        _check_one(made, model, fused, tmp_path / "fused-pruned", *case)


@pytest.mark.parametrize("name", ["jamba"])
def test_families_that_do_not_renormalise_can_keep_the_trained_scale(name: str, tmp_path: Path) -> None:
    made, model = TINY[name], tiny_family(name)
    model.save_pretrained(tmp_path / "model")
    snapshot = open_snapshot(tmp_path / "model")
    assert snapshot.moe.has_gate_scale
    selection = random_selection(snapshot, "reroute, trained", "ragged")
    tokens = random_tokens(2, 12)
    wanted = _logits(at_trained_scale(model, made, selection.layers), tokens)
    assert not _same(_logits(rerouted(model, made, selection.layers), tokens), wanted, 10 * made.tolerance)
    with masked(model, selection):
        assert _same(_logits(model, tokens), wanted, made.tolerance)
    (tmp_path / "out").mkdir()
    SafetensorsFolder("ragged").write(snapshot, selection, tmp_path / "out", Silent())
    assert _same(_logits(_loaded(getattr(transformers, made.auto), tmp_path / "out"), tokens), wanted, made.tolerance)


def _check_facts(made: TinyFamily, model: Any, moe: Any) -> None:
    """What the configuration says is what the live router does."""
    router = made.router(made.decoder_layer(model, 0))
    assert moe.num_experts == EXPERTS
    assert moe.top_k == 2
    assert (moe.groups.count if moe.groups else 1) == getattr(router, "num_group", 1)
    if hasattr(router, "norm_topk_prob") and moe.router_scores != "other":
        assert moe.renormalises == bool(router.norm_topk_prob)


def _check_trace(made: TinyFamily, model: Any, snapshot: Any) -> None:
    """The statistics are those of the slow way, and those of a model that is read layer by layer."""
    batch = make_batch(make_examples(2), [0, 1], 0)
    if made.no_trace is not None:
        with pytest.raises(UnsupportedModelError, match=made.no_trace):
            ModelTracer(model)
        return
    tracer = ModelTracer(model)
    with tracer.attached():
        logits = tracer.add(batch)
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(logits, _logits(model, batch.input_ids, attention_mask=batch.attention_mask))
    found = tracer.statistics()
    expected = naive(model, made, batch, list(tracer.layers))
    for row, layer in enumerate(tracer.layers):
        for name in NAMES:
            _close(found[name][row].reshape(-1, EXPERTS).sum(0), expected[layer][name], name)
        _close(found["residual_square"][row].sum(), expected[layer]["residual_square"], "residual_square")
        _close(found["gram_relative"][row].reshape(-1, EXPERTS, EXPERTS).sum(0), expected[layer]["gram"], "gram")
    if made.no_stream is not None:
        with pytest.raises(UnsupportedModelError, match=made.no_stream):
            _streamed(snapshot, batch)
        return
    for name, array in _streamed(snapshot, batch).items():  # bytes are compared where both read from disk
        assert np.abs(array - found[name]).max() <= 1e-6 * np.abs(found[name]).max(), name


def _streamed(snapshot: Any, batch: Any) -> dict[str, np.ndarray]:
    layered = LayeredModel(snapshot, device="cpu", dtype="float32")
    tracer = ModelTracer(layered.model)
    with layered.embeddings():
        hidden = layered.enter(batch.input_ids, batch.attention_mask)
    with tracer.attached():
        for layer in layered.layers():
            with tracer.recording(batch, layer):
                hidden = layered.advance(hidden, batch.attention_mask)
    return tracer.statistics()


def _close(found: np.ndarray, expected: torch.Tensor, what: str) -> None:
    wanted = expected.numpy()
    assert np.abs(found - wanted).max() <= 2e-4 * np.abs(wanted).max(), what


def _check_pruned(made: TinyFamily, model: Any, source: Path, folder: Path) -> None:
    for target, routing, kind in CASES:
        if routing in made.routings:
            _check_one(made, model, source, folder / f"{target}-{routing}", target, routing, kind)
        else:
            selection = random_selection(open_snapshot(source), routing, kind)
            with pytest.raises(UsageError, match="reroute"):
                SafetensorsFolder(target).write(open_snapshot(source), selection, folder / "refused", Silent())


def _check_one(made: TinyFamily, model: Any, source: Path, out: Path, target: str, routing: str, kind: str) -> None:
    """The pruned model is the original masked by hand, and by this package; what was not cut is byte for byte there."""
    snapshot = open_snapshot(source)
    selection = random_selection(snapshot, routing, kind)
    by_hand = (dropped if routing == "drop" else rerouted)(model, made, selection.layers)
    tokens = random_tokens(2, 12)
    wanted = _logits(by_hand, tokens)
    assert not _same(_logits(model, tokens), wanted, 0.01), "the selection must matter"
    with masked(model, selection):
        assert _same(_logits(model, tokens), wanted, made.tolerance)
    out.mkdir()
    SafetensorsFolder(target).write(snapshot, selection, out, Silent())
    auto = getattr(transformers, made.auto)
    pruned = _loaded(auto, out)
    assert type(pruned).__name__ == ("" if target == "stock" else "Shape") + type(model).__name__
    assert _same(_logits(pruned, tokens), wanted, made.tolerance)
    if target == "ragged":
        assert _same(_logits(_loaded(auto, out, trust_remote_code=True), tokens), wanted, made.tolerance)
        again = out.with_name(f"{out.name}-again")
        pruned.save_pretrained(again)
        assert _same(_logits(_loaded(auto, again), tokens), wanted, made.tolerance)
    longer = pruned.generate(tokens[:1], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    first = wanted[:1, -1].argmax(-1)
    assert longer[0, tokens.shape[1]] == first
    _check_bytes(source, out, selection.layers, routing)


def _loaded(auto: Any, folder: Path, **options: Any) -> Any:
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def _check_bytes(source: Path, out: Path, layers: Any, routing: str) -> None:
    """Whatever has the shape that it had, and belongs to no expert, is what it was."""
    before, after = (_tensors(folder) for folder in (source, out))
    whole = {name for name in after if name in before and after[name].shape == before[name].shape}
    kept = {name for name in whole if "experts." not in name or "shared" in name}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    cut = {name for name in before if name not in kept}
    allowed = (
        ("experts", "gate", "router", "bias", "input_linear", "output_linear")
        if routing == "reroute"
        else ("experts", "input_linear", "output_linear")
    )
    assert all(any(word in name for word in allowed) for name in cut)
    del layers


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False, **more).logits


def _same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
