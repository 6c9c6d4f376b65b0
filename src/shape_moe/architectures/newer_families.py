"""Facts about the families that are checked by ``tests/conformance``: data, no code. Most vary one of a few themes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shape_moe.architectures.family import Family

_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")

_SEVERAL_STREAMS = (
    "it keeps several residual streams (hyper-connections), and what a block adds to them is not one vector"
)

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

_GEMMA4 = replace(
    _SOFTMAX,
    block="",
    router="router",
    disk_block="",
    disk_router="router",
    router_rows=("router.proj.weight", "router.per_expert_scale"),
    router_whole=("scale",),
    projections=None,
    residual_norm="pre_feedforward_layernorm_2",
    after=("post_feedforward_layernorm_2", "post_feedforward_layernorm"),
    sum_scale="layer_scalar",
    router_scores="other",
    renormalises=True,
)
"""Experts beside a dense block, directly in the layer, with norms of their own."""
_ARIA = replace(
    _SOFTMAX,
    router="router",
    disk_router="router",
    router_rows=("router.weight",),
    projections=None,
    renormalises=True,
)
"""A softmax over the chosen experts."""
_MINIMAX_M3 = replace(
    _UNGROUPED,
    projections=None,
    routed_scale="routed_scaling_factor",
)
"""The experts' output is scaled inside the block."""
_WITH_VISION: dict[str, Any] = {
    "config_part": "text_config",
    "auto_class": "AutoModelForImageTextToText",
    "layers": ("model.language_model.layers", "language_model.model.layers", "model.layers"),
}
"""A language model inside a model that also reads images, whose parts are left alone."""

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
    replace(_ARIA, model_type="aria_text", stock_class="AriaTextForCausalLM"),
    replace(
        _SOFTMAX,
        model_type="minimax",
        stock_class="MiniMaxForCausalLM",
        disk_block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        renormalises=True,
        residual_scale_key="mlp_beta_factor",
        stream_scale_key="mlp_alpha_factor",
        stream_is_normed=True,
    ),
    replace(
        _BIAS_ON_BLOCK,
        model_type="minimax_m2",
        stock_class="MiniMaxM2ForCausalLM",
        disk_block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    replace(_MINIMAX_M3, model_type="minimax_m3_vl_text", stock_class="MiniMaxM3VLForCausalLM"),
    replace(
        _UNGROUPED,
        model_type="laguna",
        stock_class="LagunaForCausalLM",
        router_rows=("gate.weight", "experts.e_score_correction_bias", "gate.e_score_correction_bias"),
        routed_scale="moe_routed_scaling_factor",
    ),
    replace(
        _BIAS_ON_BLOCK,
        model_type="lfm2_moe",
        stock_class="Lfm2MoeForCausalLM",
        block="feed_forward",
        disk_block="feed_forward",
        router_rows=("gate.weight", "expert_bias"),
        block_rows=("expert_bias",),
        projections=("w1", "w3", "w2"),
        residual_norm="ffn_norm",
        renormalises="norm_topk_prob",
        final_norm="embedding_norm",
    ),
    replace(
        _BIAS_ON_BLOCK,
        model_type="hy_v3",
        stock_class="HYV3ForCausalLM",
        disk_router="router",
        router_rows=("router.gate.weight", "expert_bias", "gate.weight", "e_score_correction_bias"),
    ),
    replace(
        _SOFTMAX,
        model_type="hunyuan_v1_moe",
        stock_class="HunYuanMoEV1ForCausalLM",
        listed_keys=("num_experts", "moe_topk"),
        router_rows=("gate.wg.weight",),
        renormalises=True,
    ),
    replace(
        _SOFTMAX,
        model_type="ernie4_5_moe",
        stock_class="Ernie4_5_MoeForCausalLM",
        router_rows=(
            "gate.weight",
            "moe_statics.e_score_correction_bias",
            "gate.moe_statics.e_score_correction_bias",
        ),
        router_columns=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
        renormalises=True,
        has_mtp_layers=True,
    ),
    replace(
        _SIGMOID,
        model_type="bailing_hybrid",
        stock_class="BailingHybridForCausalLM",
        router_rows=("gate.weight", "gate.expert_bias", "gate.e_score_correction_bias"),
        group_keys=("num_expert_group", "topk_group"),
        renormalises="moe_renormalize",
    ),
    replace(
        _SOFTMAX,
        model_type="cohere2_moe",
        stock_class="Cohere2MoeForCausalLM",
        residual_norm="input_layernorm",
        parallel=("self_attn",),
        renormalises=True,
        routed_scale="shared_expert_combination_strategy",
        router_scores="other",
    ),
    replace(
        _BIAS_ON_BLOCK,
        model_type="afmoe",
        stock_class="AfmoeForCausalLM",
        router="router",
        disk_router="router",
        router_rows=("router.gate.weight", "expert_bias"),
        block_rows=("expert_bias",),
        residual_norm="pre_mlp_layernorm",
        after=("post_mlp_layernorm",),
    ),
    replace(_SIGMOID, model_type="axk1", stock_class="AXK1ForCausalLM", after=("mlp.post_mlp_layernorm",)),
    replace(
        _SIGMOID,
        model_type="nemotron_h",
        stock_class="NemotronHForCausalLM",
        layers=("backbone.layers", "model.layers"),
        layer_list="layers_block_type",
        block="mixer",
        disk_block="mixer",
        residual_norm="norm",
        latent=("fc1_latent_proj", "fc2_latent_proj"),
        final_norm="norm_f",
    ),
    replace(_GEMMA4, model_type="gemma4_text", stock_class="Gemma4ForCausalLM"),
    replace(
        _SOFTMAX,
        **_WITH_VISION,
        model_type="qwen3_5_moe",
        stock_class="Qwen3_5MoeForConditionalGeneration",
        renormalises=True,
        has_mtp_layers=True,
        projections=None,
    ),
    replace(
        _SOFTMAX,
        **_WITH_VISION,
        model_type="qwen3_vl_moe",
        stock_class="Qwen3VLMoeForConditionalGeneration",
        renormalises=True,
        projections=None,
    ),
    replace(
        _SIGMOID,
        **_WITH_VISION,
        model_type="glm4v_moe",
        stock_class="Glm4vMoeForConditionalGeneration",
    ),
    replace(
        _GEMMA4,
        **_WITH_VISION,
        model_type="gemma4",
        stock_class="Gemma4ForConditionalGeneration",
    ),
    replace(
        _ARIA,
        **_WITH_VISION,
        model_type="aria",
        stock_class="AriaForConditionalGeneration",
    ),
    replace(
        _MINIMAX_M3,
        **_WITH_VISION,
        model_type="minimax_m3_vl",
        stock_class="MiniMaxM3SparseForConditionalGeneration",
        disk_block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    replace(
        _SIGMOID,
        model_type="hy_v4",
        stock_class="HYV4ForCausalLM",
        untraceable=_SEVERAL_STREAMS,
        not_layered=_SEVERAL_STREAMS,
    ),
    replace(
        _SOFTMAX,
        model_type="deepseek_v4",
        stock_class="DeepseekV4ForCausalLM",
        layers=("layers", "model.layers"),
        disk_block="ffn",
        router_rows=("gate.weight", "gate.bias", "gate.e_score_correction_bias"),
        router_whole=("tid2eid",),
        router_scores="other",
        renormalises=True,
        has_mtp_layers=True,
        untraceable=_SEVERAL_STREAMS,
        not_layered=_SEVERAL_STREAMS,
        unrouted="its first layers route by a table of token ids",
    ),
)
