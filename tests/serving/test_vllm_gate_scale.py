"""Gate scale trained inside vLLM: logits of all experts come in, places and weights of kept ones go out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shape_moe.errors import ServingError
from shape_moe.serving.vllm.building import _pruned_factory
from shape_moe.serving.vllm.gate_scale import BUFFER, keep_scale
from shape_moe.serving.vllm.plan import read_plan
from support.closeness import relative_error
from support.tiny_models import make_config


class Router:
    """A softmax over the logits that it is given, as vLLM's routers compute it."""

    def select_experts(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = router_logits.softmax(-1).topk(2)
        return 1.5 * weights, ids.to(dtype)


class Runner(torch.nn.Module):
    """As much of an MoE layer of vLLM as is used."""

    def __init__(self, *, monolithic: bool = False) -> None:
        super().__init__()
        self.is_monolithic = monolithic
        self.router = Router()
        self.moe_config = SimpleNamespace(device=torch.device("cpu"))
        self.routed_experts = SimpleNamespace(quant_method=object(), forward_monolithic=lambda: "garbage")


def plan_of(**pruning: Any) -> Any:
    described = {"version": 2, "routing": "reroute", "num_experts": 8, "layers": {"0": [1, 3, 4, 6, 7]}, **pruning}
    return read_plan(make_config("olmoe", num_experts=8, shape_pruning=described))


def test_weights_are_those_of_the_softmax_over_all_experts() -> None:
    runner, kept = Runner(), [1, 3, 4, 6, 7]
    keep_scale(runner, kept, "layer")
    logits = 3 * torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    weights, places = runner.router.select_experts(torch.zeros(20, 4), logits, torch.int32)
    whole = logits.double().softmax(-1)
    chosen = whole[:, kept].topk(2).indices
    assert places.dtype == torch.int32
    assert torch.equal(places.long(), chosen)
    assert relative_error(weights, 1.5 * whole[:, kept].gather(-1, chosen)) <= 1e-6
    assert not runner.state_dict()
    assert runner.get_buffer(BUFFER).tolist() == kept


def test_kernels_that_route_by_themselves_are_refused() -> None:
    with pytest.raises(ServingError, match=r"mlp.experts.*--moe-backend"):
        keep_scale(Runner(monolithic=True), [1], "mlp.experts")
    runner = Runner()
    keep_scale(runner, [1], "layer")
    with pytest.raises(ServingError, match="bypass"):
        runner.routed_experts.forward_monolithic(torch.ones(1))


@pytest.mark.parametrize(("pruning", "rows"), [({"gate_scale": "trained"}, 8), ({}, 5), ({"version": 1}, 5)])
def test_routers_keep_their_rows_where_the_scale_needs_them(pruning, rows) -> None:
    plan, made = plan_of(**pruning), []

    def factory(**options: Any) -> Runner:
        made.append(options["num_experts"])
        return Runner()

    assert (plan.kept(0), plan.router_rows(0), plan.choices(0)) == (5, rows, 5)
    assert (plan.kept(1), plan.router_rows(1), plan.choices(1)) == (8, 8, 8)
    build = _pruned_factory(factory, plan, set())
    pruned = build(prefix="model.layers.0.mlp.experts", num_experts=rows)
    whole = build(prefix="model.layers.1.mlp.experts", num_experts=8)
    assert made == [5, 8]
    assert isinstance(pruned.router, Router)
    assert (type(pruned.router) is Router) == (rows == 5)
    assert type(whole.router) is Router
