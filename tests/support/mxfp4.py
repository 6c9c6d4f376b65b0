"""A tiny gpt-oss checkpoint whose experts are stored in MXFP4, as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import make_model, save_model

BLOCK = 32


def pack(weight: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random MXFP4 blocks and scales for a weight [E, in, out] as the model holds it.

    Two four-bit codes per byte and one power-of-two scale per 32 values: blocks [E, out, in/32, 16], scales
    [E, out, in/32]. The values are drawn anew; what is tested is where bytes go, not how well they approximate.
    """
    experts, inner, outer = weight.shape
    shape = (experts, outer, inner // BLOCK)
    blocks = torch.randint(0, 256, (*shape, BLOCK // 2), generator=generator, dtype=torch.int64).to(torch.uint8)
    scales = torch.randint(121, 125, shape, generator=generator, dtype=torch.int64).to(torch.uint8)
    return blocks, scales


def save_mxfp4_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write the checkpoint; ``changes`` override entries of its configuration."""
    model = make_model("gpt_oss", seed=seed, dtype=torch.bfloat16, **changes)
    save_model(model, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack(tensors.pop(name), generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
