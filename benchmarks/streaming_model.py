"""A random checkpoint of any size and a random calibration set, for measurements of streaming."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from shape_moe.embedded_model import embedded_model_path

HIDDEN, WIDTH, EXPERTS, TOP_K, EXAMPLES, LENGTH = 2048, 512, 40, 4, 32, 256
LAYERS_PER_GB = 4


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write a random model, one shard per layer; gives the bytes of one layer."""
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (file := embedded_model_path() / name).is_file():
            (folder / name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    weight_map: dict[str, str] = {}

    def save(shard: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
        return sum(tensor.nbytes for tensor in tensors.values())

    save(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": random_tensor(512, HIDDEN),
            "model.norm.weight": ones,
            "lm_head.weight": random_tensor(512, HIDDEN),
        },
    )
    size = 0
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors = {
            f"{at}input_layernorm.weight": ones.clone(),
            f"{at}post_attention_layernorm.weight": ones.clone(),
            f"{at}self_attn.q_proj.weight": random_tensor(2048, HIDDEN),
            f"{at}self_attn.k_proj.weight": random_tensor(512, HIDDEN),
            f"{at}self_attn.v_proj.weight": random_tensor(512, HIDDEN),
            f"{at}self_attn.o_proj.weight": random_tensor(HIDDEN, 2048),
            f"{at}self_attn.q_norm.weight": torch.ones(128, dtype=torch.bfloat16),
            f"{at}self_attn.k_norm.weight": torch.ones(128, dtype=torch.bfloat16),
            f"{at}mlp.gate.weight": random_tensor(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            for part, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
                tensors[f"{at}mlp.experts.{expert}.{part}_proj.weight"] = random_tensor(*shape)
        size = save(f"layer-{layer:03d}.safetensors", tensors)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def make_data(file: Path) -> None:
    """Random text, prompt and response: twice as many as are traced, so that others are left to judge by."""
    rng = random.Random(0)
    rows = []
    for _ in range(2 * EXAMPLES):
        text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(LENGTH))
        rows.append(json.dumps({"prompt": text[: LENGTH // 2], "response": text[LENGTH // 2 :]}) + "\n")
    file.write_text("".join(rows))
