"""Writing a pruned checkpoint against ``cp`` of the bytes that remain, both synced to disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import paired, peak_memory, write
from shape_moe.architectures.safetensors_file import make_header
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.pruning.checkpoint import plan_checkpoint, write_index, write_shard
from shape_moe.pruning.compare import compare_shard
from shape_moe.selection.selection import Selection

LAYERS, EXPERTS, HIDDEN, WIDTH, KEEP, SHARDS = 8, 64, 1024, 768, 0.6, 4
PAIRS = 7


def make_checkpoint(folder: Path) -> None:
    """A Qwen3-MoE checkpoint of about 2.4 GB of random bytes, in several shards."""
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for layer in range(shard * LAYERS // SHARDS, (shard + 1) * LAYERS // SHARDS):
            prefix = f"model.layers.{layer}.mlp"
            specs[f"{prefix}.gate.weight"] = ("BF16", (EXPERTS, HIDDEN))
            for expert in range(EXPERTS):
                specs[f"{prefix}.experts.{expert}.gate_proj.weight"] = ("BF16", (WIDTH, HIDDEN))
                specs[f"{prefix}.experts.{expert}.up_proj.weight"] = ("BF16", (WIDTH, HIDDEN))
                specs[f"{prefix}.experts.{expert}.down_proj.weight"] = ("BF16", (HIDDEN, WIDTH))
        with (folder / name).open("wb") as stream:
            stream.write(make_header(specs, {"format": "pt"}))
            for _, shape in specs.values():
                stream.write(rng.bytes(2 * int(np.prod(shape))))
        weight_map |= dict.fromkeys(specs, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def selection() -> Selection:
    """Sixty per cent of the experts of every layer, scattered."""
    rng = np.random.default_rng(1)
    count = round(KEEP * EXPERTS)
    layers = {layer: sorted(rng.choice(EXPERTS, count, replace=False).tolist()) for layer in range(LAYERS)}
    return Selection(None, None, "qwen3_moe", "random", "uniform", "drop", EXPERTS, 8, layers, KEEP)


def prune(source: Path, out: Path, *, verify: bool) -> None:
    """Write the shards, as the job does; with ``verify`` also compare and hash every byte."""
    from concurrent.futures import ThreadPoolExecutor

    out.mkdir()
    plans = plan_checkpoint(open_snapshot(source), selection())

    def work(plan: object) -> None:
        file = write_shard(plan, out)
        if verify:
            compare_shard(plan, file)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, plans))
    write_index(plans, out)


def copy(source: Path, out: Path) -> None:
    """``cp`` and a sync of every file."""
    subprocess.run(["cp", "-r", source, out], check=True)
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def memory(source: str, out: str) -> None:
    """Peak memory above that of an interpreter that has imported what is needed."""
    before = peak_memory()
    prune(Path(source), Path(out), verify=True)
    print((peak_memory() - before) / 2**20)


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as scratch:
        root = Path(scratch)
        source, kept, out = root / "source", root / "kept", root / "out"
        source.mkdir()
        make_checkpoint(source)
        prune(source, kept, verify=True)
        code = "import sys; from benchmarks.pruning_io import memory; memory(*sys.argv[1:])"
        used = subprocess.run(
            [sys.executable, "-c", code, str(source), str(root / "memory")], capture_output=True, text=True, check=True
        ).stdout
        shutil.rmtree(root / "memory")

        def fresh(work: object) -> object:
            def run() -> None:
                shutil.rmtree(out, ignore_errors=True)
                work()

            return run

        copying = fresh(lambda: copy(kept, out))
        results = {
            "bytes_of_original": sum(f.stat().st_size for f in source.iterdir()),
            "bytes_that_remain": sum(f.stat().st_size for f in kept.iterdir()),
            "keep": KEEP,
            "writing against cp": paired(fresh(lambda: prune(source, out, verify=False)), copying, PAIRS),
            "writing, comparing and hashing against cp": paired(
                fresh(lambda: prune(source, out, verify=True)), copying, PAIRS
            ),
            "peak_mib_above_interpreter": float(used),
        }
    write("pruning_io", results)


if __name__ == "__main__":
    main()
