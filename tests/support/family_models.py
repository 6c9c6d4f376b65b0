"""Tiny random models of families, built from their config classes: one list of small numbers, and what differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

EXPERTS = 8
_LATENT_ATTENTION: dict[str, Any] = {"num_key_value_heads": 4}
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "dense_intermediate_size": 24,
    "prefix_dense_intermediate_size": 24,
    "head_dim": 8,
    "swa_head_dim": 8,
    "global_head_dim": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_conv_kernel_dim": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "use_mamba_kernels": False,
    "n_groups": 1,
    "ssm_state_size": 8,
    "conv_kernel": 2,
    "chunk_size": 8,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "hc_mult": 2,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 16,
}
"""Small numbers by config key; a family takes those whose keys its class has."""
SEEING: dict[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "image_size": 28,
    "patch_size": 14,
    "deepstack_visual_indexes": [0],
}
"""The same for the part that reads images."""


@dataclass(frozen=True)
class Join:
    """How experts' outputs of one token join the residual stream, float64.

    Attributes:
        stream: what they are added to [H].
        scale: constant factor on what is added.
        reach: an expert's output as it reaches the stream, apart from the factor.
    """

    stream: torch.Tensor
    scale: float = 1.0
    reach: Callable[[torch.Tensor], torch.Tensor] = lambda output: output


def plainly(scale: float = 1.0, *beside: str, block: str = "mlp") -> Callable[..., Join]:
    """Added as the block (and what lies beside it) gives it, times a factor: the stream is the layer's output without.

    Args:
        scale: the factor.
        beside: modules whose output is added with the block's.
        block: the block.
    """

    def join(_layer: Any, seen: dict[str, Any], token: int) -> Join:
        names = (block, *beside)
        added = sum(seen[f"out:{name}"].double().flatten(0, -2)[token] for name in names)
        return Join(seen["out"].double().flatten(0, -2)[token] - scale * added, scale)

    return join


def _row(seen: dict[str, Any], name: str, token: int) -> torch.Tensor:
    return seen[name].double().flatten(0, -2)[token]


def scaled_inside(scale: float) -> Callable[..., Join]:
    """The block scales the experts' output, not the shared expert's."""
    return lambda layer, seen, token: replace(plainly()(layer, seen, token), scale=scale)


def averaged(_layer: Any, seen: dict[str, Any], token: int) -> Join:
    """Half the experts' output, and half the shared expert's."""
    return Join(_row(seen, "out", token) - _row(seen, "out:mlp", token), 0.5)


def _held(norm: Any, before: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm with the factor of one token held fixed."""
    factor = (before.double().square().mean() + getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))).rsqrt()
    return lambda output: output * factor * norm.weight.double()


def normed_after(path: str, block: str = "mlp") -> Callable[..., Join]:
    """The block's output passes a norm of the layer before it is added."""
    del block

    def join(layer: Any, seen: dict[str, Any], token: int) -> Join:
        reach = _held(layer.get_submodule(path), _row(seen, f"in:{path}", token))
        return Join(_row(seen, "out", token) - _row(seen, f"out:{path}", token), reach=reach)

    return join


normed_inside = normed_after


def raised(path: str, block: str) -> Callable[..., Join]:
    """The experts' output is projected up inside the block."""

    def join(layer: Any, seen: dict[str, Any], token: int) -> Join:
        weight = layer.get_submodule(path).weight.double()
        return replace(plainly(block=block)(layer, seen, token), reach=lambda output: output @ weight.T)

    return join


def gemma(layer: Any, seen: dict[str, Any], token: int) -> Join:
    """Two norms after the experts; the sum is scaled."""
    first, second = "post_feedforward_layernorm_2", "post_feedforward_layernorm"
    inner, outer = (_held(layer.get_submodule(p), _row(seen, f"in:{p}", token)) for p in (first, second))
    stream = _row(seen, "out", token) / layer.layer_scalar.double() - _row(seen, f"out:{second}", token)
    return Join(stream, reach=lambda output: outer(inner(output)))


PLAINLY = plainly()


@dataclass(frozen=True)
class TinyFamily:
    """How a tiny model of a family is made, and where its parts are, told independently of the package's facts.

    Attributes:
        entries: config entries that differ from the small numbers.
        text_entries: the same in the text part, where there is one.
        auto: the auto class.
        layers: path of the decoder layers.
        block_path: path of the block inside a layer.
        router_name: name of the router inside the block.
        join: how experts' outputs join the residual stream.
        no_stream: why it cannot be traced layer by layer (a part of the message), None where it can.
        no_trace: why it has no statistics, likewise.
        routings: routings that pruned models can have.
        tolerance: largest difference of logits, relative to the largest.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    text_entries: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    layers: str = "model.layers"
    block_path: str = "mlp"
    router_name: str = "gate"
    join: Callable[..., Join] = PLAINLY
    no_stream: str | None = None
    no_trace: str | None = None
    routings: tuple[str, ...] = ("drop", "reroute")
    tolerance: float = 1e-4

    def decoder_layer(self, model: Any, number: int) -> Any:
        """A decoder layer of a live model."""
        return model.get_submodule(f"{self.layers}.{number}")

    def block(self, layer: Any) -> Any:
        """The block of a layer."""
        return layer.get_submodule(self.block_path)

    def router(self, layer: Any) -> Any:
        """The router of a layer."""
        return self.block(layer).get_submodule(self.router_name)

    def experts(self, layer: Any) -> Any:
        """The experts of a layer."""
        return self.block(layer).get_submodule("experts")


_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_LATENT = TinyFamily({**_LATENT_ATTENTION, **_SPARSE})
_GRANITE = TinyFamily(
    block_path="block_sparse_moe",
    router_name="router",
    join=plainly(0.6, "shared_mlp", block="block_sparse_moe"),
)
_VISION = TinyFamily(auto="AutoModelForImageTextToText", layers="model.language_model.layers")
_ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}

TINY: dict[str, TinyFamily] = {
    "qwen3_next": TinyFamily(_MIXED),
    "qwen3_5_moe_text": TinyFamily(_MIXED),
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": replace(_LATENT, no_stream="hand each other the tokens"),
    "deepseek_v32": _LATENT,
    "mellum": TinyFamily(_SPARSE),
    "flint": TinyFamily({"mlp_only_layers": []}),
    "phimoe": TinyFamily(router_name="router"),
    "jamba": TinyFamily(
        {"expert_layer_offset": 0, "expert_layer_period": 1, "attn_layer_offset": 1, "attn_layer_period": 2},
        block_path="feed_forward",
        router_name="router",
        join=plainly(block="feed_forward"),
    ),
    "exaone_moe": TinyFamily(_SPARSE),
    "axk2": _LATENT,
    "dots1": TinyFamily(_SPARSE),
    "dots3_note_text": _LATENT,
    "solar_open": TinyFamily(),
    "mimo_v2_flash": TinyFamily({**_SPARSE}),
    "kimi_linear": TinyFamily({**_LATENT_ATTENTION, **_SPARSE, **_MIXED}),
    "granitemoeshared": replace(_GRANITE, entries={"residual_multiplier": 0.6}),
    "granitemoe_swa": replace(_GRANITE, entries={"residual_multiplier": 0.6}),
    "granitemoehybrid": replace(_GRANITE, entries={"residual_multiplier": 0.6, "layer_types": ["mamba", "attention"]}),
    "aria_text": TinyFamily(router_name="router"),
    "minimax": TinyFamily(
        {"layer_types": ["full_attention", "linear_attention"], "mlp_alpha_factor": 0.9, "mlp_beta_factor": 0.7},
        join=plainly(0.7),
    ),
    "minimax_m2": TinyFamily(),
    "minimax_m3_vl_text": TinyFamily({**_SPARSE, "routed_scaling_factor": 1.5}, join=scaled_inside(1.5)),
    "laguna": TinyFamily({**_SPARSE, "moe_routed_scaling_factor": 1.5}, join=scaled_inside(1.5)),
    "lfm2_moe": TinyFamily(
        {"layer_types": ["conv", "full_attention"]}, block_path="feed_forward", join=plainly(block="feed_forward")
    ),
    "hy_v3": TinyFamily(_SPARSE),
    "hunyuan_v1_moe": TinyFamily(),
    "ernie4_5_moe": TinyFamily({"moe_layer_start_index": 0}),
    "bailing_hybrid": TinyFamily(
        {**_LATENT_ATTENTION, **_SPARSE, **_MIXED, "layer_group_size": 2, "num_expert_group": 1, "topk_group": 1}
    ),
    "cohere2_moe": TinyFamily(_SPARSE, join=averaged),
    "afmoe": TinyFamily({"num_dense_layers": 0}, router_name="router", join=normed_after("post_mlp_layernorm")),
    "axk1": replace(_LATENT, join=normed_inside("mlp.post_mlp_layernorm")),
    "nemotron_h": TinyFamily(
        {"layers_block_type": ["moe", "attention"], "moe_latent_size": 16},
        block_path="mixer",
        join=raised("mixer.fc2_latent_proj", block="mixer"),
    ),
    "gemma4_text": TinyFamily(
        {"enable_moe_block": True, "layer_types": ["sliding_attention", "full_attention"]},
        block_path="",
        router_name="router",
        join=gemma,
    ),
    "qwen3_5_moe": replace(_VISION, text_entries=_MIXED),
    "qwen3_vl_moe": replace(_VISION, text_entries={"rope_parameters": _ROPE_3D}),
    "glm4v_moe": replace(_VISION, text_entries={"head_dim": 16, "rope_parameters": _ROPE_3D}),
    "gemma4": TinyFamily(
        auto="AutoModelForImageTextToText",
        text_entries={"enable_moe_block": True, "layer_types": ["sliding_attention", "full_attention"]},
        layers="model.language_model.layers",
        block_path="",
        router_name="router",
        join=gemma,
    ),
    "aria": replace(_VISION, router_name="router"),
    "minimax_m3_vl": replace(_VISION, text_entries={**_SPARSE, "routed_scaling_factor": 1.5}, join=scaled_inside(1.5)),
    "hy_v4": replace(_LATENT, no_trace="several residual streams"),
    "deepseek_v4": TinyFamily(no_trace="several residual streams", routings=("drop",)),
}


def tiny_config(model_type: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The config of a family's tiny model; ``changes`` override entries."""
    made = TINY[model_type]
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict()
    small = {key: value for key, value in SMALL.items() if key in known}
    if "text_config" in known:
        text_known = known["text_config"]
        text = {key: value for key, value in SMALL.items() if key in text_known}
        small["text_config"] = {**text, **made.text_entries}
        seeing = known.get("vision_config") or {}
        small["vision_config"] = {key: value for key, value in SEEING.items() if key in seeing}
    return kind(**{**small, **made.entries, **changes})


def tiny_family(model_type: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A tiny random model whose routing is decided and whose experts matter."""
    torch.manual_seed(seed)
    kind = getattr(transformers, TINY[model_type].auto)
    model = kind.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            if tensor.shape[-1:] == (EXPERTS,) and "bias" in name:
                tensor.uniform_(-0.2, 0.2)
            elif tensor.shape == (EXPERTS, model.config.get_text_config().hidden_size):
                tensor.normal_(std=0.5)
            elif "norm" in name and name.endswith("weight") and tensor.ndim == 1:
                tensor.add_(torch.rand_like(tensor) * 0.2 - 0.1)
            elif tensor.ndim >= 2 and tensor.is_floating_point():
                tensor.normal_(std=0.2)
    return model.eval()
