"""Selections as masks inside vLLM: what a masked router chooses, and routers given back as they were."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import UnsupportedModelError, UsageError
from shape_moe.serving.vllm.mask_worker import MaskExtension, masked_choice
from shape_moe.serving.vllm.masked_engine import MaskedEngine
from support.closeness import relative_error
from support.family_models import tiny_family
from support.selections import random_selection

EXPERTS, TOP_K = 8, 3


def choose(_hidden, logits, renormalise=False):
    """A router as vLLM has them: a softmax over the logits, and the largest of it."""
    weights, ids = logits.softmax(-1).topk(TOP_K)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), ids.to(torch.int32)


@given(st.integers(0, 10**6), st.sets(st.integers(0, EXPERTS - 1), min_size=TOP_K), st.booleans())
def test_masked_routers_choose_as_the_pruned_model_does(seed, kept, renormalise) -> None:
    kept = sorted(kept)
    logits = 3 * torch.randn(6, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole = logits.softmax(-1)
    weights, ids = choose(None, logits, renormalise)
    dropped, same = masked_choice(choose, kept, EXPERTS, "drop", "survivors")(None, logits, renormalise=renormalise)
    assert torch.equal(same, ids)
    assert torch.equal(dropped, weights * torch.isin(ids, torch.tensor(kept, dtype=torch.int32)))
    places = whole[:, kept].topk(TOP_K).indices
    expected = torch.tensor(kept)[places]
    for scale in ("survivors", "trained"):
        grown, ids = masked_choice(choose, kept, EXPERTS, "reroute", scale)(None, logits)
        mass = whole[:, kept].sum(-1, keepdim=True) if scale == "survivors" else 1
        assert torch.equal(ids.long(), expected)
        assert relative_error(grown, whole.gather(-1, expected) / mass) <= 1e-14


def test_without_vllm_a_worker_says_so() -> None:
    assert "docs/serving.md" in MaskExtension().shape_moe_mask({}, EXPERTS, "drop", "survivors")


def test_routers_are_given_back() -> None:
    worker, router = MaskExtension(), SimpleNamespace(select_experts=choose)
    worker._shape_moe_masked = [router]
    worker.shape_moe_unmask()
    assert not hasattr(router, "select_experts")  # a real router's own is its class's
    worker.shape_moe_unmask()


class Engine:
    """Notes what its workers are told, and refuses what it is made to refuse."""

    def __init__(self, refusal=None) -> None:
        self.told, self.refusal = [], refusal

    def collective_rpc(self, method, args=()):
        self.told.append((method, *args))
        return [None, self.refusal] if method == "shape_moe_mask" else [None, None]


@contextmanager
def engine_of(path, engine):
    found = object.__new__(MaskedEngine)
    found.snapshot, found.engine = open_snapshot(path), engine
    yield found


def test_a_selection_is_a_mask_for_a_while(checkpoint) -> None:
    selection = random_selection(open_snapshot(checkpoint("olmoe")), "reroute, trained", "ragged")
    with engine_of(checkpoint("olmoe"), Engine()) as engine, engine.masked(selection):
        layers = {str(layer): ids for layer, ids in selection.layers.items()}
        assert engine.engine.told == [("shape_moe_mask", layers, 16, "reroute", "trained")]
    assert engine.engine.told[1:] == [("shape_moe_unmask",)]


def test_what_cannot_be_masked_is_refused(checkpoint, tmp_path) -> None:
    drop = random_selection(open_snapshot(checkpoint("deepseek_v3")), "drop", "ragged")
    reroute = random_selection(open_snapshot(checkpoint("deepseek_v3")), "reroute", "equal")
    with engine_of(checkpoint("deepseek_v3"), Engine("layer 1 routes inside its kernel")) as engine:
        with pytest.raises(UsageError, match="deepseek_v3 choose by more than a softmax"), engine.masked(reroute):
            pass
        with pytest.raises(UnsupportedModelError, match="inside its kernel"), engine.masked(drop):
            pass
        assert engine.engine.told[-1] == ("shape_moe_unmask",)
    tiny_family("phimoe").save_pretrained(tmp_path / "phimoe")
    mixed = random_selection(open_snapshot(tmp_path / "phimoe"), "reroute", "ragged")
    with (
        engine_of(tmp_path / "phimoe", Engine()) as engine,
        pytest.raises(UsageError, match="phimoe choose by more than a softmax"),
        engine.masked(mixed),
    ):
        pass
    other = random_selection(open_snapshot(checkpoint("mixtral")), "drop", "ragged")
    with (
        engine_of(checkpoint("olmoe"), Engine()) as engine,
        pytest.raises(UsageError, match="8 experts per layer"),
        engine.masked(other),
    ):
        pass
