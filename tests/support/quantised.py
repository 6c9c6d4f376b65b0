"""Tiny checkpoints in the true on-disk format of every quantisation method, and the plain weights they stand for.

Packed by loops over single numbers, so that nothing is shared with what is tested; where the method's own library has a
wheel, that packs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import make_model, save_model

GROUP = 8
SIZES: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "vocab_size": 264,
}
Parts = dict[str, torch.Tensor]
Packer = Callable[[tuple[int, int], torch.Generator], tuple[Parts, torch.Tensor]]


@dataclass(frozen=True)
class Method:
    """A method: its settings in ``config.json``, and what draws and packs one matrix ``[out, in]``.

    The packer gives parts by what follows the module's name, and the plain values (float32) that they stand for.
    """

    settings: dict[str, Any]
    pack: Packer
    key: str = "quantization_config"


def draw(high: int, shape: tuple[int, ...], generator: torch.Generator, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


def scales_of(shape: tuple[int, ...], generator: torch.Generator, size: float) -> torch.Tensor:
    return ((torch.rand(shape, generator=generator) + 0.5) * size).to(torch.float16)


def matrix(shape: tuple[int, int], entry: Callable[..., float], *tensors: torch.Tensor) -> torch.Tensor:
    """The matrix with an entry for every output and input, computed from nested lists of numbers."""
    lists = [tensor.tolist() for tensor in tensors]
    return torch.tensor([[entry(o, i, *lists) for i in range(shape[1])] for o in range(shape[0])])


def words_of(numbers: list[int], bits: int) -> list[int]:
    """A stream of bits, the lowest first, as signed 32-bit words."""
    stream = sum(number << (bits * place) for place, number in enumerate(numbers))
    count = len(numbers) * bits // 32
    words = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def pack_gptq(bits: int, offset: int, *, shuffled: bool) -> Packer:
    def pack(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
        outputs, inputs = shape
        groups = inputs // GROUP
        q = draw(2**bits, (inputs, outputs), generator)
        zeros = draw(2**bits, (groups, outputs), generator, low=offset)
        scales = scales_of((groups, outputs), generator, 0.8 / 2**bits)
        index = torch.arange(inputs) // GROUP
        if shuffled:
            index = index[torch.randperm(inputs, generator=generator)]
        plain = matrix(shape, lambda o, i, q, z, s, g: (q[i][o] - z[g[i]][o]) * s[g[i]][o], q, zeros, scales, index)
        columns = [words_of(q[:, o].tolist(), bits) for o in range(outputs)]
        rows = [words_of((zeros[group] - offset).tolist(), bits) for group in range(groups)]
        parts = {
            ".qweight": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
            ".qzeros": torch.tensor(rows, dtype=torch.int32),
            ".scales": scales,
            ".g_idx": index.to(torch.int32),
        }
        return parts, plain

    return pack


def pack_awq(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
    outputs, inputs = shape
    groups = inputs // GROUP
    q, zeros = draw(16, (inputs, outputs), generator), draw(16, (groups, outputs), generator)
    scales = scales_of((groups, outputs), generator, 0.05)
    plain = matrix(shape, lambda o, i, q, z, s: (q[i][o] - z[i // GROUP][o]) * s[i // GROUP][o], q, zeros, scales)

    def rows(numbers: torch.Tensor) -> torch.Tensor:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        words = [
            [words_of([int(row[8 * word + output]) for output in order], 4)[0] for word in range(outputs // 8)]
            for row in numbers
        ]
        return torch.tensor(words, dtype=torch.int32)

    return {".qweight": rows(q), ".qzeros": rows(zeros), ".scales": scales}, plain


def pack_fp8(suffix: str, block: tuple[int, int] | None) -> Packer:
    def pack(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
        weight = torch.randn(shape, generator=generator).mul(100).to(torch.float8_e4m3fn)
        sides = block or {"_scale": (shape[0], shape[1]), "_row": (1, shape[1])}[suffix]
        grid = (-(-shape[0] // sides[0]), -(-shape[1] // sides[1]))
        scales = scales_of(grid, generator, 0.002).float()
        plain = matrix(shape, lambda o, i, q, s: q[o][i] * s[o // sides[0]][i // sides[1]], weight.float(), scales)
        stored = scales.reshape(()) if suffix == "_scale" else scales
        return {".weight": weight, f".weight{suffix if suffix.startswith('_scale') else '_scale'}": stored}, plain

    return pack


def pack_mlx(bits: int) -> Packer:
    def pack(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
        outputs, inputs = shape
        q = draw(2**bits, shape, generator)
        scales = scales_of((outputs, inputs // GROUP), generator, 0.8 / 2**bits)
        biases = scales_of((outputs, inputs // GROUP), generator, -0.4)
        plain = matrix(shape, lambda o, i, q, s, b: q[o][i] * s[o][i // GROUP] + b[o][i // GROUP], q, scales, biases)
        words = torch.tensor([words_of(row.tolist(), bits) for row in q], dtype=torch.int32).view(torch.uint32)
        return {".weight": words, ".scales": scales, ".biases": biases}, plain

    return pack


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def pack_mxfp4_rows(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
    """As compressed-tensors lays MXFP4 out: groups of 32 along the inputs that share a power of two."""
    codes, scales = draw(16, shape, generator), draw(125, (shape[0], shape[1] // 32), generator, low=121)
    plain = matrix(shape, lambda o, i, q, s: FP4[q[o][i]] * 2.0 ** (s[o][i // 32] - 127), codes, scales)
    stored = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return {".weight_packed": stored, ".weight_scale": scales.to(torch.uint8)}, plain


def pack_nvfp4(weight: str, scale: str, whole: str, *, inverse: bool) -> Packer:
    """As modelopt and compressed-tensors lay it out; the latter divides by the second scale."""

    def pack(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
        outputs, inputs = shape
        codes = draw(16, shape, generator)
        scales = (torch.rand((outputs, inputs // 16), generator=generator) * 100 + 50).to(torch.float8_e4m3fn)
        second = torch.tensor([1024.0 if inverse else 2.0**-10])
        plain = matrix(shape, lambda o, i, q, s: FP4[q[o][i]] * s[o][i // 16] / 1024, codes, scales.float())
        stored = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
        return {weight: stored, scale: scales, whole: second if inverse else second.reshape(())}, plain

    return pack


NF4 = (-1.0, -0.7, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.24, 0.34, 0.44, 0.56, 0.72, 1.0)


def pack_bitsandbytes(*, nested: bool) -> Packer:
    def pack(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
        block, outer_block = 96, 5  # no divisors of what they divide
        count = shape[0] * shape[1]
        codes, table = draw(16, (count,), generator), torch.tensor(NF4)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
        scales = scales_of((-(-count // block),), generator, 0.4).float()
        parts = {".weight.absmax": scales, ".weight.quant_map": table}
        if nested:
            inner = draw(256, (len(scales),), generator)
            inner_table = torch.linspace(-1, 1, 256)
            outer = scales_of((-(-len(scales) // outer_block),), generator, 0.1).float()
            state |= {"nested_blocksize": outer_block, "nested_dtype": "float32", "nested_offset": 0.25}
            scales = torch.stack([inner_table[c] * outer[i // outer_block] + 0.25 for i, c in enumerate(inner)])
            parts[".weight.absmax"] = inner.to(torch.uint8)
            parts |= {".weight.nested_absmax": outer, ".weight.nested_quant_map": inner_table}
        plain = torch.stack([table[code] * scales[i // block] for i, code in enumerate(codes)]).reshape(shape)
        parts[".weight"] = (16 * codes[::2] + codes[1::2]).to(torch.uint8)[:, None]
        text = json.dumps(state).encode()
        parts[".weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        return parts, plain

    return pack


def pack_compressed(settings: dict[str, Any]) -> Packer:
    """Numbers drawn here, packed by compressed-tensors itself."""

    def pack(shape: tuple[int, int], generator: torch.Generator) -> tuple[Parts, torch.Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        weights = settings["config_groups"]["group_0"]["weights"]
        symmetric, bits = weights["symmetric"], weights["num_bits"]
        group = weights.get("group_size") or shape[1]
        q = draw(2 ** (bits - 1), shape, generator, low=-(2 ** (bits - 1)))
        grid = (shape[0], shape[1] // group)
        scales = scales_of(grid, generator, 0.8 / 2**bits).to(torch.bfloat16)
        zeros = draw(1 if symmetric else 3, grid, generator, low=0 if symmetric else -3).to(torch.int8)
        plain = matrix(shape, lambda o, i, q, z, s: (q[o][i] - z[o][i // group]) * s[o][i // group], q, zeros, scales)
        scheme = QuantizationScheme.model_validate(
            {**settings["config_groups"]["group_0"], "format": settings["format"]}
        )
        given = {"weight": plain, "weight_scale": scales.float(), "weight_zero_point": zeros}
        made = BaseCompressor.get_value_from_registry(settings["format"]).compress(given, scheme)
        made["weight_scale"] = scales
        return {f".{name}": tensor.contiguous() for name, tensor in made.items()}, plain

    return pack


def compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def _compressed_method(form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> Method:
    settings = compressed(form, weights, activations)
    return Method(settings, pack_compressed(settings))


def _gptq(bits: int, form: str, *, shuffled: bool) -> Method:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": shuffled, "sym": False}
    if form != "gptq":
        settings["checkpoint_format"] = form
    return Method(settings, pack_gptq(bits, int(form == "gptq"), shuffled=shuffled))


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}
_DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_FP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": False,
}

METHODS: dict[str, Method] = {
    "fp8_block": Method(
        {"quant_method": "fp8", "weight_block_size": [24, 20], "activation_scheme": "dynamic"},
        pack_fp8("_scale_inv", (24, 20)),
    ),
    "fp8_tensor": Method({"quant_method": "fp8", "activation_scheme": "static"}, pack_fp8("_scale", None)),
    "fbgemm_fp8": Method({"quant_method": "fbgemm_fp8"}, pack_fp8("_row", None)),
    "awq": Method(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, pack_awq
    ),
    "gptq": _gptq(4, "gptq", shuffled=False),
    "gptq_act": _gptq(4, "gptq", shuffled=True),
    "gptq_v2": _gptq(4, "gptq_v2", shuffled=True),
    "gptq_2": _gptq(2, "gptq", shuffled=False),
    "gptq_3": _gptq(3, "gptq", shuffled=True),
    "gptq_8": _gptq(8, "gptq", shuffled=False),
    "compressed_int4": _compressed_method("pack-quantized", _INT4),
    "compressed_int4_zeros": _compressed_method("pack-quantized", {**_INT4, "symmetric": False}),
    "compressed_int8": _compressed_method("int-quantized", _INT8, _DYNAMIC),
    "compressed_fp8": Method(
        compressed("float-quantized", _FP8, {**_FP8, "strategy": "token", "dynamic": True}), pack_fp8("_row", None)
    ),
    "compressed_nvfp4": Method(
        compressed("nvfp4-pack-quantized", _FP4),
        pack_nvfp4(".weight_packed", ".weight_scale", ".weight_global_scale", inverse=True),
    ),
    "compressed_fp8_block": Method(
        compressed("float-quantized", {**_FP8, "strategy": "block", "block_structure": [16, 16]}),
        pack_fp8("_block", (16, 16)),
    ),
    "compressed_mxfp4": Method(
        compressed("mxfp4-pack-quantized", {**_FP4, "strategy": "group", "group_size": 32}), pack_mxfp4_rows
    ),
    "modelopt_fp8": Method({"quant_method": "modelopt", "quant_algo": "FP8"}, pack_fp8("_scale", None)),
    "modelopt_nvfp4": Method(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        pack_nvfp4(".weight", ".weight_scale", ".weight_scale_2", inverse=False),
    ),
    "bitsandbytes": Method(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        pack_bitsandbytes(nested=False),
    ),
    "bitsandbytes_nested": Method(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        pack_bitsandbytes(nested=True),
    ),
    "mlx_4": Method({"bits": 4, "group_size": GROUP}, pack_mlx(4), "quantization"),
    "mlx_3": Method({"bits": 3, "group_size": GROUP}, pack_mlx(3), "quantization"),
    "mlx_8": Method({"bits": 8, "group_size": GROUP}, pack_mlx(8), "quantization"),
}


def save_quantised(folder: Path, name: str, *, family: str = "qwen3_moe", seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a quantised checkpoint.

    Returns:
        The plain weights that it stands for, by their names in an unquantised checkpoint.
    """
    method, generator = METHODS[name], torch.Generator().manual_seed(seed)
    save_model(make_model(family, seed=seed, dtype=torch.float32, **SIZES), folder)
    plain = load_file(folder / "model.safetensors")
    stored = dict(plain)
    quantised = [key for key, tensor in plain.items() if key.endswith("_proj.weight") and tensor.ndim == 2]
    if method.key == "quantization":  # MLX quantises routers and embeddings too
        quantised += [key for key in plain if key.endswith(("mlp.gate.weight", "embed_tokens.weight"))]
    for key in quantised:
        parts, plain[key] = method.pack(tuple(plain[key].shape), generator)
        del stored[key]
        stored |= {key.removesuffix(".weight") + part: tensor for part, tensor in parts.items()}
    if method.key == "quantization":
        stored = stacked(stored)
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, method.key: method.settings}))
    return plain


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of every layer as MLX stacks them."""
    result, stacks = {}, {}
    for key, tensor in tensors.items():
        block, found, rest = key.partition(".experts.")
        if found:
            expert, projection, part = rest.split(".")
            stacks.setdefault(f"{block}.switch_mlp.{projection}.{part}", {})[int(expert)] = tensor
        else:
            result[key] = tensor
    return result | {key: torch.stack([by[expert] for expert in sorted(by)]) for key, by in stacks.items()}


def save_plain(folder: Path, plain: dict[str, torch.Tensor], *, family: str = "qwen3_moe") -> Path:
    """Write the model that a quantised checkpoint stands for."""
    save_model(make_model(family, **SIZES), folder)
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
