"""The true shapes of the published models, and small ones of the same families to try the measurement with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

SURVIVING_OF_8 = {0.8: 7.94, 0.6: 7.53}
"""Slots of 8 that fall on kept experts on the published Qwen3-30B-A3B selections for GSM8K, by keep rate."""


@dataclass(frozen=True)
class Shape:
    """One model: its config class, arguments at true size, and what to change for a small try."""

    name: str
    config: str
    arguments: dict[str, Any]
    tiny: dict[str, Any]
    published_load_gib: dict[float, float] | None = None

    def build(self, *, tiny: bool = False) -> transformers.PretrainedConfig:
        """The configuration."""
        arguments = self.arguments | (self.tiny if tiny else {})
        return getattr(transformers, self.config)(**arguments)


SHAPES = (
    Shape(
        "Qwen3-30B-A3B",
        "Qwen3MoeConfig",
        {
            "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
        },
        {
            "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 32,
        },
        {1.0: 56.93, 0.8: 46.13, 0.6: 35.24},
    ),
    Shape(
        "gpt-oss-20b",
        "GptOssConfig",
        {
            "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32,
            "num_experts_per_tok": 4, "sliding_window": 128,
        },
        {
            "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Shape(
        "DeepSeek-V2-Lite",
        "DeepseekV2Config",
        {
            "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
            "num_key_value_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
            "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        },
        {
            "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 32,
            "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        },
    ),
)  # fmt: skip
