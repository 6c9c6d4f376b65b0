"""Slicing a GGUF file against ``cp`` of the bytes that remain, both synced to disk. Small: 0.2 GB."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np

from benchmarks.harness import paired, write
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.pruning.gguf_slices import MODEL_FILE, compare_gguf, plan_gguf, write_gguf
from shape_moe.selection.selection import Selection

LAYERS, EXPERTS, HIDDEN, WIDTH, KEEP = 4, 32, 512, 768, 0.75
PAIRS = 7


def make_file(file: Path) -> Path:
    """A Qwen3-MoE file of random Q8_0 blocks."""
    writer = gguf.GGUFWriter(str(file), "qwen3moe")
    settings = {"block_count": LAYERS, "context_length": 512, "embedding_length": HIDDEN, "feed_forward_length": WIDTH}
    settings |= {"attention.head_count": 8, "attention.head_count_kv": 2, "attention.key_length": 64}
    settings |= {"attention.value_length": 64, "expert_count": EXPERTS, "expert_used_count": 4}
    for key, value in {**settings, "expert_feed_forward_length": WIDTH}.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("qwen3moe.rope.freq_base", 1e6)
    draw, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    shapes = {"attn_q": (512, HIDDEN), "attn_k": (128, HIDDEN), "attn_v": (128, HIDDEN), "attn_output": (HIDDEN, 512)}
    shapes |= {f"ffn_{part}_exps": (EXPERTS, WIDTH, HIDDEN) for part in ("gate", "up")}
    shapes["ffn_down_exps"] = (EXPERTS, HIDDEN, WIDTH)
    plain = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q_norm": (64,), "attn_k_norm": (64,)}
    plain["ffn_gate_inp"] = (EXPERTS, HIDDEN)
    for name, shape in {"token_embd": (4096, HIDDEN), "output": (4096, HIDDEN), "output_norm": (HIDDEN,)}.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, dtype=np.float32))
    for layer in range(LAYERS):
        for name, shape in plain.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", draw.standard_normal(shape, dtype=np.float32))
        for name, shape in shapes.items():
            blocks = draw.integers(0, 256, size=(*shape[:-1], shape[-1] // 32 * 34), dtype=np.uint8)
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def prune(source: GgufModel, selection: Selection, out: Path, *, verify: bool) -> Path:
    """Write the file, as the job does; with ``verify`` also compare and hash every byte."""
    out.mkdir()
    plan = plan_gguf(source, selection)
    file = write_gguf(plan, out)
    if verify:
        compare_gguf(plan, file)
    return file


def copy(source: Path, out: Path) -> None:
    """``cp`` and a sync."""
    out.mkdir()
    subprocess.run(["cp", source, out / MODEL_FILE], check=True)
    descriptor = os.open(out / MODEL_FILE, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as scratch:
        root = Path(scratch)
        source = open_snapshot(make_file(root / "source.gguf"))
        assert isinstance(source, GgufModel)
        draw, count = np.random.default_rng(1), round(KEEP * EXPERTS)
        layers = {layer: sorted(draw.choice(EXPERTS, count, replace=False).tolist()) for layer in range(LAYERS)}
        chosen = Selection(None, None, "qwen3_moe", "random", "uniform", "reroute", EXPERTS, 4, layers, KEEP)
        kept, out = prune(source, chosen, root / "kept", verify=True), root / "out"

        def fresh(work: object) -> object:
            def run() -> None:
                shutil.rmtree(out, ignore_errors=True)
                work()

            return run

        copying = fresh(lambda: copy(kept, out))
        results = {
            "bytes_of_original": source.path.stat().st_size,
            "bytes_that_remain": kept.stat().st_size,
            "quantisation": "Q8_0",
            "keep": KEEP,
            "load_before": round(os.getloadavg()[0], 1),
            "writing against cp": paired(fresh(lambda: prune(source, chosen, out, verify=False)), copying, PAIRS),
            "writing, comparing and hashing against cp": paired(
                fresh(lambda: prune(source, chosen, out, verify=True)), copying, PAIRS
            ),
        }
    write("gguf_io", results)


if __name__ == "__main__":
    main()
