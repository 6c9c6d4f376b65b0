"""The dense model's tuned kernel configuration for pruned layers, when asked for.

vLLM keeps tuned settings of its Triton kernel in files named by the number of experts (``E=128,N=768,...json``). A
pruned layer's number has no file, and falls back to defaults. Whether the dense model's file is better is a matter of
measurement on the GPU at hand, so it is used only when :data:`REUSE` is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from shape_moe.serving.vllm.plan import ServingPlan

REUSE = "SHAPE_MOE_DENSE_KERNEL_CONFIG"
"""Environment variable: set to 1 to give pruned layers the dense model's configuration where they have none."""
_KERNEL = "vllm.model_executor.layers.fused_moe.fused_moe"
_LOOKUP = "get_moe_configs"


def reuse_dense_configs(plan: ServingPlan) -> None:
    """Let pruned layers without a tuned configuration use the dense model's, if the environment asks for it."""
    if os.environ.get(REUSE) != "1":
        return
    kernel = import_module(_KERNEL)
    lookup = getattr(kernel, _LOOKUP)
    if not hasattr(lookup, "shape_moe_counts"):
        lookup = falling_back(lookup)
        setattr(kernel, _LOOKUP, lookup)
    for ids in plan.layers.values():
        lookup.shape_moe_counts.setdefault(len(ids), plan.num_experts)


def falling_back(lookup: Callable[..., Any]) -> Any:
    """A lookup of configurations by number of experts that tries the dense model's number second.

    Its attribute ``shape_moe_counts`` maps a pruned layer's number of experts to the dense model's.
    """
    dense: dict[int, int] = {}

    @cache
    def find(count: int, *rest: Any) -> Any:
        found = lookup(count, *rest)
        return lookup(dense[count], *rest) if found is None and count in dense else found

    def get_moe_configs(E: int, N: int, *rest: Any, **named: Any) -> Any:  # noqa: N803  # vLLM passes these by name
        names = ("dtype", "block_n", "block_k")
        values = (*rest, *(named[name] for name in names[len(rest) :] if name in named))
        return find(E, N, *values)

    get_moe_configs.shape_moe_counts = dense  # type: ignore[attr-defined]  # a mark on the function
    return get_moe_configs
