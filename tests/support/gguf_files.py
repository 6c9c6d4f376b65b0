"""GGUF files of tiny models, written with the ``gguf`` package as llama.cpp's converter lays them out.

What conversion does to tensors is written here anew, in the converter's direction, and compared with llama.cpp itself
by ``tests/llama_cpp``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.constants import GGMLQuantizationType

from support.tiny_models import make_model

ARCHITECTURE = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
}
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
}
"""llama.cpp has Qwen3-MoE without dense layers and OLMoE without grouped queries only, and rounds YaRN's boundaries
where Transformers does not."""

Quantise = Callable[[str, np.ndarray], GGMLQuantizationType | None]


def gguf_model(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A tiny model whose like llama.cpp can have."""
    return make_model(family, **{**CHANGES.get(family, {}), **changes})


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Valid blocks of a type that the package cannot quantise: random bits under finite scales."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, size=(*shape[:-1], shape[-1] // values, size), dtype=np.uint8)
    if kind == GGMLQuantizationType.Q4_K:
        scales = np.array([0.004, 0.008], dtype=np.float16)  # of scales and of minima
        blocks[..., :4] = scales.view(np.uint8)
    elif kind == GGMLQuantizationType.Q6_K:
        blocks[..., -2:] = np.array([0.0005], dtype=np.float16).view(np.uint8)
    else:
        raise ValueError(kind)
    return blocks.reshape(*shape[:-1], -1)


def to_gguf(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors of a file, float32, as the converter makes them from a live model."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        found |= _converted(model.config, name, tensor.detach().float())
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
for _part in ("gate", "up", "down"):
    _LAYER[f"mlp.{_part}_proj.weight"] = f"ffn_{_part}.weight"
    _LAYER[f"mlp.shared_expert.{_part}_proj.weight"] = f"ffn_{_part}_shexp.weight"
    _LAYER[f"mlp.shared_experts.{_part}_proj.weight"] = f"ffn_{_part}_shexp.weight"
for _part in ("q", "k", "v"):
    for _kind in ("weight", "bias"):
        _LAYER[f"self_attn.{_part}_proj.{_kind}"] = f"attn_{_part}.{_kind}"


def _converted(config: Any, name: str, tensor: torch.Tensor) -> dict[str, np.ndarray]:
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outside["lm_head.weight"] = "output.weight"
    if name in outside:
        return {} if name.startswith("lm_head") and config.tie_word_embeddings else {outside[name]: tensor.numpy()}
    _, _, layer, inside = name.split(".", 3)
    before = f"blk.{layer}."
    if inside.startswith("mlp.experts."):
        return {before + key: part.numpy() for key, part in _experts(config, inside, tensor).items()}
    if inside == "self_attn.kv_b_proj.weight":
        heads = tensor.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return {
            f"{before}attn_k_b.weight": keys.transpose(1, 2).contiguous().numpy(),
            f"{before}attn_v_b.weight": values.contiguous().numpy(),
        }
    if config.model_type == "mixtral" and inside in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        tensor = _swapped(tensor, config.num_attention_heads if "q_proj" in inside else config.num_key_value_heads)
    new = _LAYER[inside]
    if config.model_type in ("gpt_oss", "glm4_moe") and new == "ffn_norm.weight":
        new = "post_attention_norm.weight"
    if new == "ffn_gate_inp_shexp.weight":
        tensor = tensor.reshape(-1)
    return {before + new: tensor.numpy()}


def _swapped(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of halves into pairs, as llama.cpp's rotary kernel for this architecture reads them."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _experts(config: Any, inside: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if config.model_type == "gpt_oss":
        kind = "bias" if inside.endswith("_bias") else "weight"
        columns = tensor.transpose(1, 2) if kind == "weight" else tensor
        if "gate_up" in inside:
            return {f"ffn_gate_exps.{kind}": columns[:, 0::2], f"ffn_up_exps.{kind}": columns[:, 1::2]}
        return {f"ffn_down_exps.{kind}": columns}
    if "gate_up" in inside:
        gate, up = tensor.chunk(2, dim=1)
        return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
    return {"ffn_down_exps.weight": tensor}


def metadata_of(config: Any) -> dict[str, Any]:
    """The architecture's entries of metadata, without prefix."""
    kind = config.model_type
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_used_count": config.num_experts_per_tok,
        "expert_count": getattr(config, "n_routed_experts", None) or config.num_experts,
    }
    if kind in ("qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"):
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if kind == "qwen2_moe":
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if kind in ("qwen3_moe", "gpt_oss", "glm4_moe"):
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if kind == "mixtral":
        found["rope.dimension_count"] = config.hidden_size // config.num_attention_heads
    if kind == "gpt_oss":
        found |= {"attention.sliding_window": config.sliding_window}
        found["expert_feed_forward_length"] = config.intermediate_size
    if kind in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        found |= {
            "expert_shared_count": config.n_shared_experts,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": bool(getattr(config, "norm_topk_prob", False)),
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_gating_func": 1 if kind == "deepseek_v2" else 2,
        }
        if config.n_group > 1:
            found |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if kind == "glm4_moe":
        found["rope.dimension_count"] = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    if kind in ("deepseek_v2", "deepseek_v3"):
        rope = config.qk_rope_head_dim
        found |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": config.q_lora_rank,
            "attention.kv_lora_rank": config.kv_lora_rank,
            "attention.key_length": config.kv_lora_rank + rope,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_nope_head_dim + rope,
            "attention.value_length_mla": config.v_head_dim,
            "rope.dimension_count": rope,
        }
    return found


def write_gguf(
    file: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    raw_types: Mapping[str, GGMLQuantizationType] | None = None,
    tokenizer: bool = True,
    name: str = "Tiny Model",
    pre: str = "qwen2",
    sentencepiece: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file.

    Args:
        file: where.
        architecture: its name.
        metadata: the architecture's entries, without prefix.
        tensors: values (float32), or blocks (uint8) of the types in ``raw_types``.
        raw_types: types of tensors that are given as blocks.
        tokenizer: add a tokenizer of bytes.
        name: of the model.
        pre: the way in which the tokenizer splits text.
        sentencepiece: give it a tokenizer of scores instead of one of merges.
        extra: further entries.
    """
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    writer.add_size_label("16x1K")
    writer.add_file_type(0)
    for key, value in metadata.items():
        _add(writer, f"{architecture}.{key}", value)
    if tokenizer:
        size = tensors["token_embd.weight"].shape[0]
        add_sentencepiece(writer, size) if sentencepiece else add_tokenizer(writer, size, pre)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    for key, values in tensors.items():
        writer.add_tensor(key, values, raw_dtype=(raw_types or {}).get(key))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def add_sentencepiece(writer: gguf.GGUFWriter, size: int) -> None:
    """A tokenizer of single bytes, letters and a few pieces with scores."""
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789.,+?", "th", "at", "\u2581th", "\u2581that", "12"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces), 0, -1)]
    rest = size - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *[f"<unused{i}>" for i in range(rest)]])
    writer.add_token_scores([*scores, *[-1000.0] * rest])
    writer.add_token_types([*kinds, *[5] * rest])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


_MERGES = ("t h", "a t", "th at", "1 2", "12 3", "Ġ 1", "Ġ th", "Ġ a", "! !", "Ġ Ġ", "x !", ". .", "e r", "' s", "Ċ Ċ")


def vocabulary(size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types: three special ones, characters of the byte alphabet (spaces first), merged ones."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    first = [alphabet[ord(" ")], alphabet[ord("\n")]]
    merged = [pair.replace(" ", "") for pair in merges(size)]
    letters = [*first, *(letter for letter in alphabet.values() if letter not in first)][: size - 3 - len(merged)]
    tokens = ["<pad>", "<s>", "</s>", *letters, *merged]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    ordinary = len(letters) + len(merged)
    kinds = [3, 3, 3, *[1] * ordinary, *[5] * (size - 3 - ordinary)]
    return tokens, kinds


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def merges(size: int) -> tuple[str, ...]:
    """The merges of a tokenizer: one where the vocabulary does not have all bytes."""
    return _MERGES if size > 300 else _MERGES[:1]


def add_tokenizer(writer: gguf.GGUFWriter, size: int, pre: str) -> None:
    """A byte-level tokenizer."""
    tokens, kinds = vocabulary(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(merges(size)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def save_gguf(
    model: transformers.PreTrainedModel, file: Path, quantise: Quantise | None = None, **options: Any
) -> Path:
    """Write a live model.

    Args:
        model: the model.
        file: where.
        quantise: the type of a tensor, by its name and values, None for float32.
        options: see :func:`write_gguf`.
    """
    tensors, types = to_gguf(model), {}
    for name, values in tensors.items():
        kind = quantise(name, values) if quantise else None
        if kind is not None:
            tensors[name], types[name] = gguf.quants.quantize(values, kind), kind
    arch = ARCHITECTURE[model.config.model_type]
    return write_gguf(file, arch, metadata_of(model.config), tensors, raw_types=types, **options)


def matrices(kind: GGMLQuantizationType) -> Quantise:
    """Quantise matrices of decoder layers whose rows are whole blocks, routers apart."""

    def choose(name: str, values: np.ndarray) -> GGMLQuantizationType | None:
        block = gguf.GGML_QUANT_SIZES[kind][0]
        fits = values.ndim >= 2 and values.shape[-1] % block == 0 and "ffn_gate_inp" not in name
        return kind if fits and name.startswith("blk.") else None

    return choose


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations about sums."""
    rows = []
    for a, b in np.random.default_rng(0).integers(0, 99, size=(count, 2)):
        said = [
            {"role": "user", "content": f"what is {a} + {b}?"},
            {"role": "assistant", "content": f"that is {a + b}"},
        ]
        rows.append({"messages": said})
    return rows
