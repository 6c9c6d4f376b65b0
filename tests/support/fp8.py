"""A tiny Qwen3-MoE checkpoint in block-FP8, laid out as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import make_model, save_model

BLOCK = 16


def save_fp8_model(folder: Path, *, seed: int = 0) -> Path:
    """Write the checkpoint: float8 matrices of decoder layers with one scale per 16 x 16 block, routers left alone."""
    model = make_model("qwen3_moe", seed=seed, dtype=torch.bfloat16, intermediate_size=48, moe_intermediate_size=32)
    save_model(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if "_proj.weight" in n]:
        weight = tensors[name].float()
        rows, columns = weight.shape
        blocks = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        quantised = (blocks / scale[:, None, :, None]).reshape(rows, columns)
        tensors[name] = quantised.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.2.mlp.gate"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
