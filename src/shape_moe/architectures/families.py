"""What is known about each model family: facts as data, no code.

A family belongs here when its experts follow the uniform interface of Transformers
(``@use_experts_implementation``) and every fact below was checked on a model built from its config class. See
``docs/add-a-model.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Facts about one model family.

    Attributes:
        model_type: ``config.json``'s ``model_type``.
        stock_class: class of the causal language model in Transformers.
        count_keys: config keys that may hold the number of routed experts; those present are read and written.
        top_k_keys: config keys that may hold the number of experts per token.
        block: path of the MoE block inside a decoder layer of the live model.
        router: path of the router inside the block of the live model.
        experts: path of the experts module inside the block of the live model.
        router_top_k: attribute of the live router that says how many experts it chooses.
        disk_block: path of the MoE block inside a decoder layer on disk.
        disk_router: path of the router inside the block on disk.
        router_rows: router tensors on disk with one row per expert, relative to the block on disk; in the original
            layout and in that of the live model, which ``save_pretrained(save_original_format=False)`` writes.
        projections: an expert's gate, up and down projections on disk, None where they are packed.
        packed: tensors on disk that hold all experts of a layer outside of ``experts``, relative to the block; the down
            projections last.
        residual_norm: norm in the decoder layer whose input is the residual stream that feeds the block.
        residual_scale_key: config key of the factor on the block's output, None where there is none.
        router_scores: how router logits become probabilities.
        renormalises: config key (or a constant) that says whether gate weights sum to one over the top-k.
        group_keys: config keys of the number of router groups and of the groups a token may use; None without.
        group_minimum: experts that a group must keep for the router's group score to be defined.
        transformers: oldest version of Transformers whose router and experts have the interface, where that is newer
            than the oldest that this package takes.
        has_mtp_layers: whether checkpoints may carry multi-token-prediction layers after the decoder layers.
        mtp_count_key: config key that counts those layers.
        vision: beginnings of the names of tensors on disk that belong to vision parts, which text does not use.
    """

    model_type: str
    stock_class: str
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    router_top_k: str = "top_k"
    disk_block: str = "mlp"
    disk_router: str = "gate"
    router_rows: tuple[str, ...] = ("gate.weight",)
    projections: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    packed: tuple[str, ...] = ()
    residual_norm: str = "post_attention_layernorm"
    residual_scale_key: str | None = None
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalises: str | bool = "norm_topk_prob"
    group_keys: tuple[str, str] | None = None
    group_minimum: int = 1
    transformers: str | None = None
    has_mtp_layers: bool = False
    mtp_count_key: str = "num_nextn_predict_layers"
    vision: tuple[str, ...] = ()


QUANTISATION_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".input_scale", ".activation_scale")
"""Endings of the names of a quantised checkpoint's tensors that servers use and Transformers does not."""

_CORRECTED_GATE = ("gate.weight", "gate.e_score_correction_bias")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen3_moe", "Qwen3MoeForCausalLM"),
        Family("qwen2_moe", "Qwen2MoeForCausalLM"),
        Family("olmoe", "OlmoeForCausalLM"),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            count_keys=("num_local_experts", "num_experts"),
            disk_block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
            renormalises=True,
        ),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            count_keys=("num_local_experts", "num_experts"),
            top_k_keys=("num_experts_per_tok", "experts_per_token"),
            router="router",
            disk_router="router",
            router_rows=("router.weight", "router.bias"),
            projections=None,
            renormalises=True,
        ),
        Family(
            "granitemoe",
            "GraniteMoeForCausalLM",
            count_keys=("num_local_experts", "num_experts"),
            block="block_sparse_moe",
            router="router",
            disk_block="block_sparse_moe",
            disk_router="router",
            router_rows=("router.layer.weight", "router.weight"),
            projections=None,
            packed=("input_linear.weight", "output_linear.weight"),
            residual_scale_key="residual_multiplier",
            renormalises=True,
            transformers="5.23",
        ),
        Family(
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            count_keys=("n_routed_experts", "num_experts", "num_local_experts"),
            renormalises=False,
            group_keys=("n_group", "topk_group"),
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            count_keys=("n_routed_experts", "num_local_experts", "num_experts"),
            router_rows=_CORRECTED_GATE,
            router_scores="sigmoid",
            group_keys=("n_group", "topk_group"),
            group_minimum=2,
            has_mtp_layers=True,
        ),
        Family(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            count_keys=("n_routed_experts", "num_local_experts", "num_experts"),
            router_rows=_CORRECTED_GATE,
            router_scores="sigmoid",
            group_keys=("n_group", "topk_group"),
            group_minimum=2,
            has_mtp_layers=True,
        ),
    )
}


def family_names() -> str:
    """The supported families as a readable list, for messages."""
    return ", ".join(sorted(FAMILIES))
