"""Tiny random models of every supported family, built from their config classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_DEEPSEEK = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.5,
}
_QWEN = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 16, "num_experts_per_tok": 4}

FAMILY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {**_QWEN, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_QWEN, "shared_expert_intermediate_size": 40, "norm_topk_prob": False}),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 24, "num_experts": 16, "num_experts_per_tok": 4}),
    "mixtral": (
        "MixtralConfig",
        {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {
            "intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.4,
        },
    ),
    "deepseek_v2": ("DeepseekV2Config", {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}),
    "deepseek_v2_grouped": (
        "DeepseekV2Config",
        {**_DEEPSEEK, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3Config", {**_DEEPSEEK, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 8,
        },
    ),
}
FAMILIES = tuple(FAMILY_CONFIGS)
GROUPED = ("deepseek_v2_grouped", "deepseek_v3")


def make_config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The config of a tiny model; ``changes`` override entries."""
    name, entries = FAMILY_CONFIGS[family]
    config_class = getattr(transformers, name)
    return config_class(**{**COMMON, **entries, **changes})


def make_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> transformers.PreTrainedModel:
    """A tiny random model whose routing is decided and whose experts matter."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(make_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                tensor.uniform_(-0.2, 0.2)
            elif "router" in name or ".gate." in name:
                tensor.normal_(std=0.5)
            elif tensor.ndim >= 2 or "bias" in name:
                tensor.normal_(std=0.2)
    return model.to(dtype).eval()


def moe_block(layer: torch.nn.Module) -> torch.nn.Module:
    """The feed-forward block of a decoder layer, routed or dense, whatever its name is."""
    return layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe


def router_of(layer: torch.nn.Module) -> torch.nn.Module:
    """The router of a decoder layer's MoE block."""
    block = moe_block(layer)
    return block.router if hasattr(block, "router") else block.gate


def save_model(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Save a model in its original layout on disk."""
    model.save_pretrained(folder, **options)
    return folder


def random_tokens(rows: int, length: int, *, seed: int = 0, vocab: int = 128) -> torch.Tensor:
    """Random token ids that avoid the special ones."""
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
