"""Tiny MLX checkpoints of families that MLX lays out in another way than Transformers, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.quantised import FP4, GROUP, Parts, draw, matrix, pack_mlx, words_of
from support.tiny_models import make_model, save_model

MLX_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64},
    "gpt_oss": {"hidden_size": 32, "intermediate_size": 32},
    "granitemoe": {"intermediate_size": 32},
    "deepseek_v3": {"moe_intermediate_size": 32},
}
Tensors = dict[str, torch.Tensor]


def pack_mxfp4(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
    """One matrix in the mode ``mxfp4``: groups of 32 that share a power of two."""
    codes, scales = draw(16, shape, generator), draw(125, (shape[0], shape[1] // 32), generator, low=121)
    plain = matrix(shape, lambda o, i, q, s: FP4[q[o][i]] * 2.0 ** (s[o][i // 32] - 127), codes, scales)
    words = torch.tensor([words_of(row.tolist(), 4) for row in codes], dtype=torch.int32).view(torch.uint32)
    return {".weight": words, ".scales": scales.to(torch.uint8)}, plain


def save_mlx(folder: Path, family: str, *, seed: int = 0) -> Tensors:
    """Write a checkpoint.

    Returns:
        The plain weights that it stands for, by their names in an unquantised checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)
    save_model(make_model(family, seed=seed, **MLX_SIZES[family]), folder)
    plain = load_file(folder / "model.safetensors")
    stored, settings = dict(plain), {"bits": 4, "group_size": GROUP, "mode": "affine"}
    EXPERTS[family](plain, stored, generator, settings)
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": settings}))
    return plain


def _packed_stack(count: int, shape: tuple[int, int], pack: Callable[..., Any], generator: torch.Generator) -> Any:
    """Parts of a stack of matrices, and their plain values ``[E, out, in]``."""
    made = [pack(shape, generator) for _ in range(count)]
    parts = {part: torch.stack([parts[part] for parts, _ in made]) for part in made[0][0]}
    return parts, torch.stack([values for _, values in made])


def _mixtral(plain: Tensors, stored: Tensors, generator: torch.Generator, settings: dict[str, Any]) -> None:
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for key in [key for key in plain if ".experts.0." in key]:
        block, projection = key.partition(".experts.0.")[0], key.split(".")[-2]
        parts, values = _packed_stack(8, tuple(plain[key].shape), pack_mlx(4), generator)
        for expert in range(8):
            plain[f"{block}.experts.{expert}.{projection}.weight"] = values[expert]
            del stored[f"{block}.experts.{expert}.{projection}.weight"]
        stored |= {f"{block}.switch_mlp.{names[projection]}{part}": tensor for part, tensor in parts.items()}


def _gpt_oss(plain: Tensors, stored: Tensors, generator: torch.Generator, settings: dict[str, Any]) -> None:
    settings |= {"group_size": 32, "mode": "mxfp4"}
    for key in [key for key in plain if key.endswith("mlp.experts.down_proj")]:
        block = key.removesuffix(".down_proj")
        count, inner, hidden = plain[key].shape
        found = {}
        for projection, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            parts, found[projection] = _packed_stack(count, shape, pack_mxfp4, generator)
            stored |= {f"{block}.{projection}_proj{part}": tensor for part, tensor in parts.items()}
        plain[key] = found["down"].transpose(1, 2)
        plain[f"{block}.gate_up_proj"][..., 0::2] = found["gate"].transpose(1, 2)
        plain[f"{block}.gate_up_proj"][..., 1::2] = found["up"].transpose(1, 2)
        bias = stored.pop(f"{block}.gate_up_proj_bias")
        stored[f"{block}.gate_proj.bias"], stored[f"{block}.up_proj.bias"] = bias[:, 0::2], bias[:, 1::2]
        stored[f"{block}.down_proj.bias"] = stored.pop(f"{block}.down_proj_bias")
        del stored[key], stored[f"{block}.gate_up_proj"]
    for key in [key for key in plain if key.endswith("router.weight")]:  # settings of its own, under its name
        parts, plain[key] = pack_mlx(8)(tuple(plain[key].shape), generator)
        settings[key.removesuffix(".weight")] = {"bits": 8, "group_size": GROUP, "mode": "affine"}
        del stored[key]
        stored |= {key.removesuffix(".weight") + part: tensor for part, tensor in parts.items()}


def _granite(plain: Tensors, stored: Tensors, generator: torch.Generator, settings: dict[str, Any]) -> None:
    for key in [key for key in plain if key.endswith("input_linear.weight")]:
        block = key.removesuffix(".input_linear.weight")
        count, both, hidden = plain[key].shape
        gate, gates = _packed_stack(count, (both // 2, hidden), pack_mlx(4), generator)
        up, ups = _packed_stack(count, (both // 2, hidden), pack_mlx(4), generator)
        down, plain[f"{block}.output_linear.weight"] = _packed_stack(count, (hidden, both // 2), pack_mlx(4), generator)
        plain[key] = torch.cat([gates, ups], dim=1)
        del stored[key], stored[f"{block}.output_linear.weight"]
        for projection, parts in (("gate", gate), ("up", up), ("down", down)):
            stored |= {f"{block}.switch_mlp.{projection}_proj{part}": tensor for part, tensor in parts.items()}


def _latent(plain: Tensors, stored: Tensors, generator: torch.Generator, settings: dict[str, Any]) -> None:
    heads, keys, values = 4, 8, 8
    for key in [key for key in plain if key.endswith("kv_b_proj.weight")]:
        place = key.removesuffix(".kv_b_proj.weight")
        rank = plain[key].shape[1]
        query, plain_query = _packed_stack(heads, (rank, keys), pack_mlx(4), generator)
        out, plain_out = _packed_stack(heads, (values, rank), pack_mlx(4), generator)
        rows = [torch.cat([plain_query[head].T, plain_out[head]]) for head in range(heads)]
        plain[key] = torch.cat(rows)
        del stored[key]
        stored |= {f"{place}.embed_q{part}": tensor for part, tensor in query.items()}
        stored |= {f"{place}.unembed_out{part}": tensor for part, tensor in out.items()}
    for key in [key for key in plain if ".experts.0." in key]:
        block, projection = key.partition(".experts.0.")[0], key.split(".")[-2]
        same = [f"{block}.experts.{expert}.{projection}.weight" for expert in range(16)]
        stored[f"{block}.switch_mlp.{projection}.weight"] = torch.stack([stored.pop(name) for name in same])


EXPERTS: dict[str, Callable[[Tensors, Tensors, torch.Generator, dict[str, Any]], None]] = {
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "granitemoe": _granite,
    "deepseek_v3": _latent,
}
"""How MLX lays the experts (and latent attention) of a family out."""
