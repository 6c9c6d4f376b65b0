"""Peak memory, prefill and decode throughput and tracing overhead at the true shapes, dense beside pruned.

``python -m benchmarks.gpu`` needs a GPU that holds the largest model (57 GiB in bfloat16); ``--tiny --device cpu``
tries the same code on small models and writes nothing unless told where.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.routing import nested_sets, scale_routers, set_survival, surviving_slots
from benchmarks.gpu.shapes import SHAPES, SURVIVING_OF_8, Shape
from shape_moe.architectures.sites import find_sites, live_moe_config
from shape_moe.calibration.batches import make_batch
from shape_moe.calibration.examples import Example
from shape_moe.evaluation.footprint import run_once
from shape_moe.pruning.surgery import prune_model
from shape_moe.selection.selection import Selection
from shape_moe.tracing.transformers_model import ModelTracer

KEEP_RATES = [0.8, 0.6]
REPEATS = 5


class Machine:
    """Clock and memory of a device."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.on_gpu = self.device.type == "cuda"

    def now(self) -> float:
        """Seconds, once all work is done."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self) -> None:
        """Free what is free and forget the peak."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int | None]:
        """Bytes of tensors now, and at the peak since the last reset; None on a CPU, which does not tell."""
        if not self.on_gpu:
            return {"allocated": None, "peak": None}
        return {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}

    def describe(self) -> dict[str, Any]:
        """What this was measured on."""
        card = torch.cuda.get_device_name(self.device) if self.on_gpu else "none"
        packages = {name: version(name) for name in ("torch", "transformers", "shape-moe")}
        return {"card": card, "cuda": torch.version.cuda, **packages}


def build(shape: Shape, machine: Machine, *, tiny: bool) -> Any:
    """The dense model with random weights, made on the device in bfloat16."""
    torch.manual_seed(0)
    with machine.device:
        return AutoModelForCausalLM.from_config(shape.build(tiny=tiny), dtype=torch.bfloat16).eval()


def measure(model: Any, machine: Machine, ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Memory and speed of one model on the fixed workload."""
    run_once(model, ids, 2)
    machine.reset()
    resident = machine.memory()["allocated"]
    times = [run_once(model, ids, new_tokens) for _ in range(REPEATS)]
    return {
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "allocated_bytes": resident,
        "peak_bytes": machine.memory()["peak"],
        "prefill_tokens_per_second": ids.numel() / statistics.median(prefill for prefill, _ in times),
        "decode_tokens_per_second": len(ids) * new_tokens / statistics.median(decode for _, decode in times),
    }


def tracing_overhead(model: Any, machine: Machine, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of a traced pass against a plain one, in turn."""
    rows = [Example.answered(i, "", tuple(row), len(row) // 2) for i, row in enumerate(ids.tolist())]
    batch, tracer, ratios = make_batch(rows, range(len(rows)), 0), ModelTracer(model), []
    for repeat in range(REPEATS + 1):
        began = machine.now()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        between = machine.now()
        with tracer.attached():
            tracer.add(batch, logits_to_keep=1)
        if repeat:
            ratios.append((machine.now() - between) / (between - began))
    return {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}


def select(model: Any, layers: dict[int, list[int]], keep: float, routing: str) -> Selection:
    """A selection of given experts."""
    moe = live_moe_config(model)
    return Selection(None, None, None, "given", "given", routing, moe.num_experts, moe.top_k, layers, keep)


def one_shape(shape: Shape, machine: Machine, *, tiny: bool) -> dict[str, Any]:
    """Dense, and both keep rates in both routings, each cut from the same random model."""
    batch, prompt, new = (2, 16, 4) if tiny else (8, 512, 64)
    rows: dict[str, Any] = {}
    scales: dict[int, torch.Tensor] = {}
    for keep, routing in [(1.0, "dense"), *((keep, how) for keep in KEEP_RATES for how in ("drop", "reroute"))]:
        machine.reset()
        model = build(shape, machine, tiny=tiny)
        moe, layers = live_moe_config(model), [site.layer for site in find_sites(model)]
        ids = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
        ids = ids.to(machine.device)
        kept = nested_sets(moe.num_experts, layers, KEEP_RATES)
        wanted = {rate: SURVIVING_OF_8[rate] / 8 * moe.top_k for rate in KEEP_RATES}
        if scales:  # the same random model and input again
            scale_routers(model, scales)
        else:
            scales = set_survival(model, ids, kept, wanted, moe.top_k)
        surviving = float(moe.top_k)
        if routing == "dense":
            rows["tracing_overhead"] = tracing_overhead(model, machine, ids)
        else:
            selection = select(model, kept[keep], keep, routing)
            if routing == "drop":
                surviving = surviving_slots(model, ids, selection, moe.top_k)
            model = prune_model(model, selection)
        found = measure(model, machine, ids, new)
        rows[f"{keep:g} {routing}"] = {"surviving_slots_per_token": surviving, **found}
        print(shape.name, f"{keep:g}", routing, json.dumps(rows[f"{keep:g} {routing}"]), flush=True)
        del model
    return {
        "workload": {"batch": batch, "prompt_tokens": prompt, "new_tokens": new, "dtype": "bfloat16"},
        "top_k": moe.top_k,
        "rows": rows,
        "published_load_gib": shape.published_load_gib,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help="one model's name")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/gpu.json unless --tiny")
    asked = parser.parse_args()
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny --device cpu tries the code without one")
    machine = Machine(asked.device)
    shapes = [shape for shape in SHAPES if asked.only in {None, shape.name}]
    results = {shape.name: one_shape(shape, machine, tiny=asked.tiny) for shape in shapes}
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    document = {"measured": today, "machine": machine.describe(), "tiny": asked.tiny, "results": results}
    default = None if asked.tiny else Path(__file__).parents[1] / "results" / "gpu.json"
    if file := asked.output or default:
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
