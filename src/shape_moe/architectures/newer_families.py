"""Facts about the families that are checked by ``tests/conformance``: data, no code. Most vary one of a few themes."""

from __future__ import annotations

from dataclasses import replace

from shape_moe.architectures.family import Family

_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")

_SOFTMAX = Family("", "", count_keys=_COUNTS, top_k_keys=_TOP_K, transformers="5.13")
"""A softmax over all experts."""
_SIGMOID = replace(
    _SOFTMAX,
    router_rows=("gate.weight", "gate.e_score_correction_bias", "e_score_correction_bias"),
    router_scores="sigmoid",
    group_keys=("n_group", "topk_group"),
    group_minimum=2,
    has_mtp_layers=True,
)
"""The router of DeepSeek-V3: sigmoids, a bias for the choice alone, groups."""
_GRANITE = replace(
    _SOFTMAX,
    block="block_sparse_moe",
    router="router",
    disk_block="block_sparse_moe",
    disk_router="router",
    router_rows=("router.layer.weight", "router.weight"),
    projections=None,
    packed=("input_linear.weight", "output_linear.weight"),
    residual_scale_key="residual_multiplier",
    renormalises=True,
    beside=("shared_mlp",),
    transformers="5.23",
)
"""A multiplier on what joins the residual stream, and a shared expert outside of the block."""
_UNGROUPED = replace(_SIGMOID, group_keys=None, renormalises=True)
_BIAS_ON_BLOCK = replace(_UNGROUPED, block_rows=("e_score_correction_bias",))
"""The bias for the choice lies on the block, which hands it to the router."""

NEWER: tuple[Family, ...] = (
    replace(_SOFTMAX, model_type="qwen3_next", stock_class="Qwen3NextForCausalLM", has_mtp_layers=True),
    replace(
        _SOFTMAX,
        model_type="qwen3_5_moe_text",
        stock_class="Qwen3_5MoeForCausalLM",
        renormalises=True,
        has_mtp_layers=True,
    ),
    replace(_SIGMOID, model_type="glm4_moe_lite", stock_class="Glm4MoeLiteForCausalLM"),
    replace(
        _SIGMOID,
        model_type="glm_moe_dsa",
        stock_class="GlmMoeDsaForCausalLM",
        not_layered="its layers hand each other the tokens that attention has chosen",
    ),
    replace(_SIGMOID, model_type="deepseek_v32", stock_class="DeepseekV32ForCausalLM"),
    replace(_SOFTMAX, model_type="mellum", stock_class="MellumForCausalLM", has_mtp_layers=True),
    replace(_SOFTMAX, model_type="flint", stock_class="FlintForCausalLM", router_scores="sigmoid"),
    replace(
        _SOFTMAX,
        model_type="phimoe",
        stock_class="PhimoeForCausalLM",
        router="router",
        disk_block="block_sparse_moe",
        router_rows=("gate.weight", "router.weight"),
        projections=("w1", "w3", "w2"),
        router_scores="other",
        renormalises=False,
    ),
    replace(
        _SOFTMAX,
        model_type="jamba",
        stock_class="JambaForCausalLM",
        block="feed_forward",
        router="router",
        disk_block="feed_forward",
        disk_router="router",
        router_rows=("router.weight",),
        residual_norm="pre_ff_layernorm",
        renormalises=False,
        final_norm="final_layernorm",
    ),
    replace(_SIGMOID, model_type="exaone_moe", stock_class="ExaoneMoeForCausalLM"),
    replace(_SIGMOID, model_type="axk2", stock_class="AXK2ForCausalLM"),
    replace(_SIGMOID, model_type="dots1", stock_class="Dots1ForCausalLM"),
    replace(_SIGMOID, model_type="dots3_note_text", stock_class="Dots3NoteForCausalLM"),
    replace(_SIGMOID, model_type="solar_open", stock_class="SolarOpenForCausalLM"),
    replace(_SIGMOID, model_type="mimo_v2_flash", stock_class="MiMoV2FlashForCausalLM"),
    replace(
        _SIGMOID,
        model_type="kimi_linear",
        stock_class="KimiLinearForCausalLM",
        group_keys=("num_expert_group", "topk_group"),
        renormalises="moe_renormalize",
        disk_block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    replace(_GRANITE, model_type="granitemoeshared", stock_class="GraniteMoeSharedForCausalLM"),
    replace(_GRANITE, model_type="granitemoe_swa", stock_class="GraniteMoeSWAForCausalLM"),
    replace(_GRANITE, model_type="granitemoehybrid", stock_class="GraniteMoeHybridForCausalLM"),
    replace(
        _SOFTMAX,
        model_type="aria_text",
        stock_class="AriaTextForCausalLM",
        router="router",
        disk_router="router",
        router_rows=("router.weight",),
        projections=None,
        renormalises=True,
    ),
)
