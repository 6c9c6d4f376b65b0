"""Routing drop inside vLLM: ids are translated, dropped slots weigh nothing, and nothing bypasses that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.errors import ServingError
from shape_moe.serving.vllm.building import _pruned_factory, _pruned_init
from shape_moe.serving.vllm.dropping import BUFFER, drop_pruned, drop_slots, slot_table
from shape_moe.serving.vllm.plan import read_plan
from support.tiny_models import make_config


class Router:
    """As much of a router of vLLM as is used."""

    global_num_experts = 0

    def select_experts(self, weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weights, ids


class Runner(torch.nn.Module):
    """As much of an MoE layer of vLLM as is used."""

    def __init__(self, *, monolithic: bool = False) -> None:
        super().__init__()
        self.is_monolithic = monolithic
        self.router = Router()
        self.moe_config = SimpleNamespace(device=torch.device("cpu"))
        self.routed_experts = SimpleNamespace(quant_method=object(), forward_monolithic=lambda: "garbage")


@given(st.data())
def test_outputs_are_those_of_the_masked_layer(data) -> None:
    total = data.draw(st.integers(2, 12))
    kept = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    top_k = data.draw(st.integers(1, total))
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(total, generator=generator)[:top_k] for _ in range(5)]).to(torch.int32)
    weights = torch.rand(5, top_k, generator=generator)
    experts = torch.randn(total, 3, generator=generator)
    new_weights, local = drop_slots(weights, ids, slot_table(kept, total))
    assert (new_weights.dtype, local.dtype) == (weights.dtype, ids.dtype)
    assert local.min() >= 0
    assert local.max() < len(kept)
    alive = torch.isin(ids, torch.tensor(kept, dtype=torch.int32))
    expected = (experts[ids] * (weights * alive)[..., None]).sum(1)
    assert torch.allclose((experts[kept][local] * new_weights[..., None]).sum(1), expected)
    for row in range(5):  # no expert is computed that the token did not choose, where one survives
        if alive[row].any():
            assert set(torch.tensor(kept)[local[row]].tolist()) <= set(ids[row].tolist())


def test_padding_weighs_nothing() -> None:
    weights, local = drop_slots(torch.ones(1, 2), torch.tensor([[-1, 3]]), slot_table([1, 3], 4))
    assert weights.tolist() == [[0, 1]]
    assert local.tolist() == [[1, 1]]


def test_a_layer_drops() -> None:
    runner = Runner()
    drop_pruned(runner, [1, 3], 4, "layer")
    weights, local = runner.router.select_experts(torch.ones(1, 2), torch.tensor([[3, 0]]))
    assert weights.tolist() == [[1, 0]]
    assert local.tolist() == [[1, 1]]
    assert isinstance(runner.router, Router)
    assert runner.router.global_num_experts == 4
    assert runner.get_buffer(BUFFER).data_ptr() == runner.router.shape_moe_slots.data_ptr()
    assert not runner.state_dict()


def test_kernels_that_route_by_themselves_are_refused() -> None:
    with pytest.raises(ServingError, match=r"model.layers.2.mlp.experts.*--moe-backend"):
        drop_pruned(Runner(monolithic=True), [1], 4, "model.layers.2.mlp.experts")
    runner = Runner()
    drop_pruned(runner, [1], 4, "layer")
    with pytest.raises(ServingError, match="bypass"):
        runner.routed_experts.forward_monolithic(torch.ones(1))


def served(routing: str) -> tuple[Any, Any]:
    """A plan for layer 0 with experts 1, 3, 5 and 7 of eight, and its configuration."""
    pruning = {"version": 1, "routing": routing, "num_experts": 8, "layers": {"0": [1, 3, 5, 7]}}
    config = make_config("mixtral", shape_pruning=pruning)
    return read_plan(config), config


@pytest.mark.parametrize(("routing", "rows"), [("drop", 8), ("reroute", 4)])
def test_blocks_are_built_with_their_layers_count(routing, rows) -> None:
    plan, config = served(routing)
    seen = []

    class Block:
        def __init__(self, num_experts: int, prefix: str = "") -> None:
            seen.append((num_experts, config.num_local_experts))

    built = _pruned_init(Block.__init__, plan, config)
    built(object.__new__(Block), 8, prefix="model.layers.0.mlp")
    built(object.__new__(Block), num_experts=8, prefix="model.layers.1.mlp")
    assert seen == [(rows, rows), (8, 8)]
    assert config.num_local_experts == 8


@pytest.mark.parametrize(("routing", "rows"), [("drop", 8), ("reroute", 4)])
def test_experts_are_allocated_for_what_is_kept(routing, rows) -> None:
    plan, _ = served(routing)
    made, built = [], set()

    def factory(**options: Any) -> Runner:
        made.append(options["num_experts"])
        return Runner()

    build = _pruned_factory(factory, plan, built)
    runner = build(prefix="model.layers.0.mlp.experts", num_experts=rows, top_k=2)
    build(prefix="model.layers.1.mlp.experts", num_experts=8, top_k=2)
    assert (made, built) == ([4, 8], {0, 1})
    assert type(runner.router).__name__ == ("DroppingRouter" if routing == "drop" else "Router")
    with pytest.raises(ServingError, match="not understood"):
        build(prefix="model.layers.0.mlp.experts", num_experts=5)
    with pytest.raises(ServingError, match="fuse shared experts"):
        build(prefix="model.layers.0.mlp.experts", num_experts=rows, fuse_shared_experts=True)
    if routing == "reroute":
        with pytest.raises(ServingError, match="without groups"):
            build(prefix="model.layers.0.mlp.experts", num_experts=4, use_grouped_topk=True, num_expert_group=3)
