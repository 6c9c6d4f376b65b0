"""Tracing layer by layer against tracing the whole model in memory: whole commands on a random checkpoint.

Time, largest resident memory above that of an interpreter with the same imports, and bytes of weights read. The files'
pages are dropped from the cache before each command where the system allows it; what it does not, flatters both.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from benchmarks.harness import write
from shape_moe.embedded_model import embedded_model_path

HIDDEN, WIDTH, EXPERTS, TOP_K, EXAMPLES, LENGTH = 2048, 512, 40, 4, 32, 256
LAYERS_PER_GB = 4
PAIRS = 1
"""One pair says which is larger; more say by how much."""
_CHILD = """
import json, sys, time
from benchmarks.harness import peak_memory
import psutil, torch, transformers, transformers.models.qwen3_moe.modeling_qwen3_moe, accelerate
import shape_moe.jobs.trace, shape_moe.tracing.layer_by_layer, shape_moe.tracing.transformers_model, pyarrow.parquet
base, began = peak_memory(), time.perf_counter()
from shape_moe.cli.main import run
code = run(sys.argv[2:])
io = psutil.Process().io_counters()
found = {"code": code, "interpreter": base, "peak": peak_memory(), "from_disk": io.read_bytes}
open(sys.argv[1], "w").write(json.dumps(found))
"""


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
    """Random text, prompt and response."""
    rng = random.Random(0)
    rows = []
    for _ in range(EXAMPLES):
        text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(LENGTH))
        rows.append(json.dumps({"prompt": text[: LENGTH // 2], "response": text[LENGTH // 2 :]}) + "\n")
    file.write_text("".join(rows))


def forget(folder: Path) -> None:
    """Drop the files' pages from the system's cache."""
    if hasattr(os, "posix_fadvise"):
        for file in folder.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def command(model: Path, data: Path, out: Path, flag: str) -> dict[str, Any]:
    """One whole command in a process of its own."""
    import time

    forget(model)
    report = out.with_suffix(".json")
    began = time.perf_counter()
    arguments = ["trace", model, "--data", data, "-o", out, "--device", "cpu", flag, "-q"]
    subprocess.run([sys.executable, "-c", _CHILD, report, *map(str, arguments)], check=True)
    found = json.loads(report.read_text())
    assert found.pop("code") == 0
    return {"seconds": time.perf_counter() - began, **found, "above": found["peak"] - found["interpreter"]}


def measure(gigabytes: int, place: Path) -> dict[str, Any]:
    """Pairs of commands on one checkpoint."""
    model, data = place / "model", place / "data.jsonl"
    model.mkdir()
    layer = make_checkpoint(model, gigabytes * LAYERS_PER_GB)
    make_data(data)
    runs: dict[str, list[dict[str, Any]]] = {"--stream": [], "--no-stream": []}
    same = []
    for pair in range(PAIRS):
        for flag, found in runs.items():
            found.append(command(model, data, place / f"{flag.strip('-')}-{pair}", flag))
        files = [place / f"{flag.strip('-')}-{pair}" / "statistics.safetensors" for flag in runs]
        same.append(files[0].read_bytes() == files[1].read_bytes())
    median = {
        flag: {key: statistics.median(run[key] for run in found) for key in found[0]} for flag, found in runs.items()
    }
    return {
        "weights_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "layer_bytes": layer,
        "layers": gigabytes * LAYERS_PER_GB,
        "pairs": PAIRS,
        "streamed": median["--stream"],
        "whole": median["--no-stream"],
        "time_ratio": statistics.median(
            a["seconds"] / b["seconds"] for a, b in zip(runs["--stream"], runs["--no-stream"], strict=True)
        ),
        "streamed_peak_above_interpreter_less_two_layers": median["--stream"]["above"] - 2 * layer,
        "same_statistics": all(same),
    }


def main() -> None:
    """Measure at 2 GB, or at the sizes in GB that are given, and write."""
    results = {}
    for size in map(int, sys.argv[1:] or ["2"]):
        with tempfile.TemporaryDirectory(prefix="streaming-") as place:
            results[f"{size} GB"] = measure(size, Path(place))
    shape = f"hidden {HIDDEN}, {EXPERTS} experts of width {WIDTH}, top-{TOP_K}, bfloat16, {EXAMPLES} x {LENGTH} tokens"
    write("streaming", {"shape": shape, **results})


if __name__ == "__main__":
    main()
