"""Every family in a real vLLM: the answers of the masked original, and not one byte for dropped experts.

The families run with routings, eager and compiled execution, one and two tensor-parallel ranks, and pruned and
original checkpoints on disk; any two of these settings meet somewhere. ``SHAPE_MOE_FULL_MATRIX=1`` runs every
combination. Two of the families that do not renormalise gate weights keep their trained scale.
"""

from __future__ import annotations

import os
from itertools import product

import pytest

from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from shape_moe.serving.vllm import overrides
from support.engines import assert_same_answers, engine_options, needs_vllm, run_engine
from support.selections import random_selection
from support.served_models import CHANGES
from support.tiny_models import make_model, save_model

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

PAIRWISE = [
    ("qwen3_moe", "drop", "compiled", 2, "pruned"),
    ("qwen3_moe", "reroute", "eager", 1, "original"),
    ("qwen2_moe", "drop", "eager", 1, "original"),
    ("qwen2_moe", "reroute", "compiled", 2, "pruned"),
    ("olmoe", "drop", "eager", 2, "pruned"),
    ("olmoe", "reroute, trained", "compiled", 1, "original"),
    ("mixtral", "drop", "compiled", 1, "original"),
    ("mixtral", "reroute", "eager", 2, "pruned"),
    ("gpt_oss", "drop", "compiled", 1, "pruned"),
    ("gpt_oss", "reroute", "eager", 2, "original"),
    ("glm4_moe", "reroute", "eager", 1, "original"),
    ("deepseek_v2", "drop", "eager", 2, "original"),
    ("deepseek_v2", "reroute, trained", "compiled", 1, "pruned"),
    ("deepseek_v3", "drop", "compiled", 1, "pruned"),
    ("deepseek_v3", "reroute", "eager", 2, "original"),
]
FULL = [
    (family, routing, mode, ranks, source)
    for family, routing, mode, ranks, source in product(
        [*dict.fromkeys(case[0] for case in PAIRWISE), "deepseek_v2_grouped"],
        ("drop", "reroute"),
        ("eager", "compiled"),
        (1, 2),
        ("pruned", "original"),
    )
    # The stock model answers NaN there.
    if not (family.startswith("deepseek") and mode == "compiled" and ranks == 2)
]


def expert_bytes(snapshot: Snapshot, selection: Selection) -> int:
    """Bytes of the kept experts on disk, without the router."""
    total = 0
    for name, slot in snapshot.tensors.items():
        role = snapshot.role(name)
        if role.role == "expert":
            total += slot.size * (role.expert in selection.layers[role.layer])
        elif role.role == "packed":
            total += slot.size * len(selection.layers[role.layer]) // snapshot.moe.num_experts
    return total


@pytest.mark.parametrize(
    ("family", "routing", "mode", "ranks", "source"), FULL if os.environ.get("SHAPE_MOE_FULL_MATRIX") else PAIRWISE
)
def test_it_answers_like_the_masked_original(tmp_path, family, routing, mode, ranks, source) -> None:
    model = make_model(family, **CHANGES[family])
    original = save_model(model, tmp_path / "original")
    snapshot = open_snapshot(original)
    selection = random_selection(snapshot, routing, "ragged")
    options = engine_options(family, mode, ranks)
    served = original
    if source == "original":
        options["hf_overrides"] = overrides(original, selection)
    else:
        served = tmp_path / "pruned"
        prune(original, served, PruneOptions(device="cpu", check_logits=False), selection=selection)
    result = run_engine(tmp_path, served, options)
    with masked(model, selection):
        assert_same_answers(model, result.answers)
    assert len(result.experts) == ranks
    for rank in result.experts:
        for name, (shape, _) in rank.items():
            assert shape[0] == len(selection.layers[int(name.split(".")[2])])
    # Every rank holds the whole bias of the down projections.
    shared = (ranks - 1) * sum(size for name, (_, size) in result.experts[0].items() if name.endswith("w2_bias"))
    allocated = sum(size for rank in result.experts for _, size in rank.values())
    assert allocated - shared == expert_bytes(snapshot, selection)
