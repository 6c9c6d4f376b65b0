"""vLLM's model code, made to build every layer with its own number of experts.

While a pruned model is built, the MoE block's constructor and the module's ``FusedMoEFactory`` are wrapped. The block
sees a configuration that counts what its layer's router knows, and so builds the right router; the factory allocates
kept experts alone. Nothing stays changed afterwards.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from shape_moe.errors import ServingError
from shape_moe.serving.vllm.dropping import drop_pruned
from shape_moe.serving.vllm.gate_scale import keep_scale
from shape_moe.serving.vllm.plan import ServingPlan, expert_count
from shape_moe.serving.vllm.startup import check_groups

_MODELS = "vllm.model_executor.models"
_FACTORY = "FusedMoEFactory"


def model_module(plan_module: str) -> Any:
    """One of vLLM's model modules."""
    return import_module(f"{_MODELS}.{plan_module}")


@contextmanager
def pruned_layers(plan: ServingPlan, config: Any) -> Iterator[set[int]]:
    """While this lasts, vLLM builds the family's MoE layers pruned.

    Args:
        plan: what to keep.
        config: the model's configuration.

    Yields:
        The layers built so far.

    Raises:
        ServingError: when vLLM's model code is not the one that this plugin knows.
    """
    module = model_module(plan.facts.module)
    block, factory = getattr(module, plan.facts.block, None), getattr(module, _FACTORY, None)
    if block is None or factory is None:
        raise ServingError(
            f"This version of vLLM builds {plan.family.model_type} in a way that shape-moe does not know "
            f"({plan.facts.block} and {_FACTORY} in {module.__name__}): install a tested version."
        )
    init, built = block.__init__, set[int]()
    block.__init__ = _pruned_init(init, plan, config)
    setattr(module, _FACTORY, _pruned_factory(factory, plan, built))
    try:
        yield built
    finally:
        block.__init__ = init
        setattr(module, _FACTORY, factory)


def layer_index(name: str) -> int:
    """The decoder layer of a module name such as ``model.layers.3.mlp.experts``.

    Raises:
        ServingError: for a name without a layer.
    """
    match = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    if match is None:
        raise ServingError(f"vLLM builds an MoE layer called {name!r}, which names no decoder layer.")
    return int(match[1])


def _pruned_init(init: Callable[..., None], plan: ServingPlan, config: Any) -> Callable[..., None]:
    signature = inspect.signature(init)

    def pruned_init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        rows = plan.router_rows(layer_index(bound.arguments["prefix"]))
        if "num_experts" in bound.arguments:
            bound.arguments["num_experts"] = rows
        with expert_count(plan, config, rows):
            init(*bound.args, **bound.kwargs)

    return pruned_init


def _pruned_factory(factory: Callable[..., Any], plan: ServingPlan, built: set[int]) -> Callable[..., Any]:
    def pruned_factory(*, prefix: str, num_experts: int, **options: Any) -> Any:
        layer = layer_index(prefix)
        if num_experts != plan.router_rows(layer):
            raise ServingError(
                f"vLLM gives {prefix} {num_experts} experts where its router knows {plan.router_rows(layer)}: this "
                "version of vLLM is not understood."
            )
        if options.get("fuse_shared_experts"):
            raise ServingError(
                "vLLM would fuse shared experts into the routed ones, whose numbers pruning changes: turn the fusion "
                "off (VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0)."
            )
        if options.get("use_grouped_topk"):
            check_groups(plan, layer, options.get("num_expert_group") or 1)
        runner = factory(prefix=prefix, num_experts=plan.kept(layer), **options)
        if plan.routing == "drop" and layer in plan.layers:
            drop_pruned(runner, plan.layers[layer], plan.num_experts, prefix)
        elif plan.gate_scale == "trained" and layer in plan.layers:
            keep_scale(runner, plan.layers[layer], prefix)
        built.add(layer)
        return runner

    return pruned_factory
