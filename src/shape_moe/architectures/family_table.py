"""What is known about each model family: facts as data, no code.

A family belongs here when its experts follow the uniform interface of Transformers
(``@use_experts_implementation``) and every fact below was checked on a model built from its config class.
"""

from __future__ import annotations

from shape_moe.architectures.family import Family

_CORRECTED_GATE = ("gate.weight", "gate.e_score_correction_bias")

TABLE: tuple[Family, ...] = (
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
