"""Imatrices of tiny models as llama.cpp collects them, and files of both formats packed by hand."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

Collected = dict[str, tuple[np.ndarray, np.ndarray]]
"""By name of a matrix: sums of squares [experts, columns] and tokens [experts]."""


def collect(model: transformers.PreTrainedModel, inputs: Sequence[torch.Tensor]) -> Collected:
    """Sums of squares of what the experts' matrices are multiplied with, and tokens, by a plain loop over tokens.

    For families whose live experts hold ``gate_up_proj`` with gate rows first (Qwen3-MoE and its like).
    """
    found: Collected = {}
    with ExitStack() as hooks, torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            experts = getattr(layer.mlp, "experts", None)
            if experts is not None:
                handle = experts.register_forward_pre_hook(_collector(found, number), with_kwargs=True)
                hooks.callback(handle.remove)
        for ids in inputs:
            model(input_ids=ids[None])
    return found


def _collector(found: Collected, layer: int):
    def hook(experts, arguments, named) -> None:
        states, chosen = arguments[0].reshape(-1, arguments[0].shape[-1]), arguments[1]
        matrices = experts.gate_up_proj.detach().double()
        inner = matrices.shape[1] // 2
        for part, width in (("gate", states.shape[-1]), ("up", states.shape[-1]), ("down", inner)):
            empty = np.zeros((len(matrices), width)), np.zeros(len(matrices))
            found.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", empty)
        for state, ids in zip(states.double(), chosen, strict=True):
            for expert in ids.tolist():
                gate, up = (matrices[expert] @ state).split(inner)
                seen = {"gate": state, "up": state, "down": experts.act_fn(gate) * up}
                for part, values in seen.items():
                    sums, counts = found[f"blk.{layer}.ffn_{part}_exps.weight"]
                    sums[expert] += values.square().numpy()
                    counts[expert] += 1

    return hook


def pack_gguf(collected: Mapping[str, tuple[np.ndarray, np.ndarray]], file: Path, chunks: int = 3) -> Path:
    """A file as llama-imatrix writes it today."""
    writer = gguf.GGUFWriter(str(file), arch="")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.train.raw"])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in sorted(collected.items()):
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def pack_legacy(collected: Mapping[str, tuple[np.ndarray, np.ndarray]], file: Path, calls: int = 3) -> Path:
    """A file in the older format: means times calls, and the number of calls where there was no token."""
    parts = [struct.pack("<i", len(collected))]
    for name, (sums, counts) in sorted(collected.items()):
        used = counts[:, None] > 0
        stored = np.where(used, sums / np.maximum(counts, 1)[:, None] * calls, calls).astype("<f4")
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, stored.size)]
        parts.append(stored.tobytes())
    text = b"wiki.train.raw"
    parts.append(struct.pack("<ii", calls, len(text)) + text)
    file.write_bytes(b"".join(parts))
    return file
