"""Tiny models with dimensions that vLLM's CPU kernels can serve."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
_QWEN = {**_COMMON, "moe_intermediate_size": 64, "intermediate_size": 96}
_DEEPSEEK = {
    **_COMMON,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}

CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_QWEN, "head_dim": 32},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 96},
    "olmoe": {**_COMMON, "intermediate_size": 64},
    "mixtral": {**_COMMON, "intermediate_size": 64},
    "gpt_oss": {**_COMMON, "intermediate_size": 64, "head_dim": 32},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v2_grouped": _DEEPSEEK,
    "deepseek_v3": {**_DEEPSEEK, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {**_QWEN, "head_dim": 32},
}
"""By family: what to change in the tiny model of :mod:`support.tiny_models`. Experts are 64 wide, so that two ranks
get 32 each, which the kernels take without padding."""
