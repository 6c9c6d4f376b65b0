"""What is known about each model architecture of GGUF files: facts as data, no code.

Names of tensors come from the ``gguf`` package's own map; what stands here is which of Transformers' modules an
architecture has, where its hyper-parameters lie in the metadata, and what conversion did to its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_MODEL = ("model.embed_tokens", "model.norm", "lm_head")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LATENT = (
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_a_layernorm",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_a_layernorm",
    "self_attn.kv_b_proj",
    "self_attn.k_b_proj",
    "self_attn.v_b_proj",
    "self_attn.o_proj",
)
_EXPERTS = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
_DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj")

_COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
}
_GROUP_KEYS = {"expert_group_count": "n_group", "expert_group_used_count": "topk_group"}
_SHARED_KEYS = {
    "feed_forward_length": "intermediate_size",
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
}


@dataclass(frozen=True)
class GgufArchitecture:
    """Facts about one architecture.

    Attributes:
        name: ``general.architecture``.
        map_name: its name in the ``gguf`` package's enumeration of architectures.
        family: the model type in Transformers.
        layer_modules: modules of a decoder layer that may have tensors.
        keys: keys of the configuration by keys of the metadata (without the architecture's prefix).
        constants: keys of the configuration that the metadata do not say.
        swapped_rotary: whether conversion reorders the rows of the query and key projections (rotary halves become
            pairs), as llama.cpp's kernel for this architecture wants them.
        interleaved_experts: whether Transformers holds experts transposed, gate and up columns in turns.
        dense_layers_key: key of the configuration that lists layers without experts, None where there is none.
        default_top_groups: whether a missing number of router groups means one.
        model_modules: modules outside the decoder layers.
    """

    name: str
    map_name: str
    family: str
    layer_modules: tuple[str, ...]
    keys: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    swapped_rotary: bool = False
    interleaved_experts: bool = False
    dense_layers_key: str | None = None
    default_top_groups: bool = False
    model_modules: tuple[str, ...] = _MODEL


ARCHITECTURES: dict[str, GgufArchitecture] = {
    known.name: known
    for known in (
        GgufArchitecture(
            "qwen3moe",
            "QWEN3MOE",
            "qwen3_moe",
            (*_NORMS, *_ATTENTION, *_QK_NORMS, "mlp.gate", *_EXPERTS, *_DENSE),
            {
                **_COMMON_KEYS,
                "feed_forward_length": "intermediate_size",
                "attention.key_length": "head_dim",
                "expert_count": "num_experts",
            },
            {"norm_topk_prob": True, "decoder_sparse_step": 1},
            dense_layers_key="mlp_only_layers",
        ),
        GgufArchitecture(
            "qwen2moe",
            "QWEN2MOE",
            "qwen2_moe",
            (
                *(*_NORMS, *_ATTENTION, "mlp.gate", "mlp.shared_expert_gate", *_EXPERTS, *_DENSE),
                *("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
            ),
            {**_COMMON_KEYS, "feed_forward_length": "intermediate_size", "expert_count": "num_experts"},
            {"norm_topk_prob": False, "decoder_sparse_step": 1},
            dense_layers_key="mlp_only_layers",
        ),
        GgufArchitecture(
            "olmoe",
            "OLMOE",
            "olmoe",
            (*_NORMS, *_ATTENTION, *_QK_NORMS, "mlp.gate", *_EXPERTS),
            {**_COMMON_KEYS, "expert_count": "num_experts", "attention.clamp_kqv": "clip_qkv"},
            {"norm_topk_prob": False},
        ),
        GgufArchitecture(
            "llama",
            "LLAMA",
            "mixtral",
            (*_NORMS, *_ATTENTION, "mlp.gate", *_EXPERTS),
            {**_COMMON_KEYS, "expert_count": "num_local_experts", "attention.key_length": "head_dim"},
            {"sliding_window": None},
            swapped_rotary=True,
        ),
        GgufArchitecture(
            "gpt-oss",
            "GPT_OSS",
            "gpt_oss",
            (*_NORMS, *_ATTENTION, "self_attn.sinks", "mlp.router", *_EXPERTS),
            {
                **_COMMON_KEYS,
                "expert_count": "num_local_experts",
                "attention.key_length": "head_dim",
                "attention.sliding_window": "sliding_window",
            },
            interleaved_experts=True,
        ),
        GgufArchitecture(
            "deepseek2",
            "DEEPSEEK2",
            "deepseek_v2",
            (*_NORMS, *_LATENT, "mlp.gate", "mlp.gate.e_score_correction", *_EXPERTS, *_DENSE, *_SHARED),
            {
                **{key: name for key, name in _COMMON_KEYS.items() if key != "attention.head_count_kv"},
                **_SHARED_KEYS,
                **_GROUP_KEYS,
                "attention.q_lora_rank": "q_lora_rank",
                "attention.kv_lora_rank": "kv_lora_rank",
                "rope.dimension_count": "qk_rope_head_dim",
            },
            default_top_groups=True,
        ),
        GgufArchitecture(
            "glm4moe",
            "GLM4_MOE",
            "glm4_moe",
            (*_NORMS, *_ATTENTION, *_QK_NORMS, "mlp.gate", "mlp.gate.e_score_correction", *_EXPERTS, *_DENSE, *_SHARED),
            {**_COMMON_KEYS, **_SHARED_KEYS, **_GROUP_KEYS, "attention.key_length": "head_dim"},
            default_top_groups=True,
        ),
    )
}

UNNAMED_SUFFIX = {"mlp.gate.e_score_correction": "_bias", "self_attn.sinks": ""}
"""What follows these modules' names in Transformers; in the file it is ``.bias`` or ``.weight``."""

LEFT_ASIDE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd.weight")
"""Endings of tensors that hold what Transformers computes from the configuration."""
