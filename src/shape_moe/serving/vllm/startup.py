"""What must hold before a server may start with a pruned model; each refusal is one sentence."""

from __future__ import annotations

import os
from typing import Any

from shape_moe.errors import ServingError
from shape_moe.serving.vllm.plan import ServingPlan

TESTED_VERSIONS = ("0.32.0",)
"""Versions of vLLM with which this plugin was tested; it reaches into vLLM's model code, which changes."""
ANY_VERSION = "SHAPE_MOE_ANY_VLLM"
"""Environment variable: set to 1 to try another version."""


def check_version(version: str) -> None:
    """Refuse a version of vLLM that this plugin was not tested with.

    Raises:
        ServingError: naming the versions that were, and how to try nevertheless.
    """
    if version.partition("+")[0] not in TESTED_VERSIONS and os.environ.get(ANY_VERSION) != "1":
        raise ServingError(
            f"shape-moe serves pruned models with vLLM {', '.join(TESTED_VERSIONS)}, and this is {version}: install "
            f"a tested version, or set {ANY_VERSION}=1 to try this one and check its answers with shape-moe verify."
        )


def check_startup(plan: ServingPlan, vllm_config: Any) -> None:
    """Refuse settings under which a pruned model would not run as it should.

    Args:
        plan: the pruned model.
        vllm_config: vLLM's complete configuration.

    Raises:
        ServingError: naming the setting and the layer.
    """
    parallel, config = vllm_config.parallel_config, vllm_config.model_config.hf_config
    if parallel.enable_eplb:
        raise ServingError("Expert load balancing needs equal expert counts in all layers: leave --enable-eplb out.")
    if vllm_config.lora_config is not None:
        raise ServingError("LoRA adapters are made for the original's experts: a pruned model is served without.")
    _check_parallel(plan, parallel, config)
    groups = getattr(config, "n_group", None) or 1
    if plan.family.group_keys and getattr(config, "topk_method", None) != "greedy":
        for layer in plan.layers:
            check_groups(plan, layer, groups)


def _check_parallel(plan: ServingPlan, parallel: Any, config: Any) -> None:
    ranks = parallel.tensor_parallel_size * parallel.data_parallel_size
    if parallel.enable_expert_parallel:
        for layer, ids in plan.layers.items():
            if len(ids) % ranks:
                raise ServingError(
                    f"Layer {layer} keeps {len(ids)} experts, which {ranks} expert-parallel ranks cannot share evenly: "
                    f"select with --multiple-of {ranks}, or leave --enable-expert-parallel out."
                )
        return
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    if width % ranks:
        raise ServingError(
            f"An expert is {width} wide, which {ranks} ranks (tensor times data parallel) cannot share evenly: "
            "choose a size that divides it."
        )


def check_groups(plan: ServingPlan, layer: int, groups: int) -> None:
    """Refuse a layer whose grouped routing vLLM would turn into ungrouped routing without a word.

    Raises:
        ServingError: when what the router chooses among is not a multiple (two or more per group) of the groups.
    """
    rows = plan.choices(layer)
    if groups > 1 and (rows % groups or rows <= groups):
        raise ServingError(
            f"Layer {layer} keeps {rows} experts for {groups} router groups, and vLLM would silently route without "
            "groups: select with this model's trace, which keeps groups equal, or use routing drop."
        )
