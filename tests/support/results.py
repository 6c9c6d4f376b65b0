"""Results of the verbs sweep and evaluate, as files: made up, but valid and consistent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSIONS = {"shape-moe": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


def estimate(value: float, spread: float) -> dict[str, float]:
    """A figure with its interval."""
    return {"value": value, "low": value - spread, "high": value + spread}


def quality(loss: float, *, exact: float | None = 0.9) -> dict[str, Any]:
    """Quality of a model that has lost this much (0 for the dense one)."""
    found = {
        "nll": estimate(1.2 + loss, 0.04),
        "perplexity": estimate(3.32 * (1 + loss), 0.1),
        "kl": estimate(loss, 0.2 * loss),
        "top1": estimate(max(0.0, 1 - 0.6 * loss), 0.01),
    }
    return found if exact is None else {**found, "exact_match": estimate(max(0.0, exact - 0.5 * loss), 0.03)}


def change(loss: float, *, exact: float | None = 0.9) -> dict[str, Any]:
    """Paired differences of such a model to the dense one."""
    found = {"nll": estimate(loss, 0.01), "perplexity": estimate(1 + loss, 0.01)}
    return found if exact is None else {**found, "exact_match": estimate(-0.5 * loss, 0.02)}


def generation(loss: float) -> dict[str, Any]:
    """Health of free-running answers."""
    return {
        "loop_rate": estimate(0.01 + 0.2 * loss, 0.01),
        "no_end_rate": estimate(0.02 + 0.2 * loss, 0.01),
        "length": estimate(180.0 + 40 * loss, 6.0),
        "exact_match": estimate(max(0.0, 0.86 - 0.6 * loss), 0.04),
        "change": {"exact_match": estimate(-0.6 * loss, 0.03)},
        "limit": 512,
        "complaints": []
        if loss <= 0.2
        else [f"{0.01 + 0.2 * loss:.1%} of the answers loop (1.0% of the dense model's)"],
    }


def loss_at(keep: float, factor: float = 1.0) -> float:
    """More is lost the less is kept."""
    return factor * (1 - keep) ** 2.2


def sweep_document(
    *,
    model: str = "Qwen/Qwen3-30B-A3B",
    fingerprint: str | None = None,
    total: int = 6144,
    dense_bytes: int = 61_064_000_000,
    expert_share: float = 0.94,
    methods: tuple[tuple[str, str], ...] = (("shape", "coverage"), ("contribution", "global"), ("reap", "uniform")),
    keeps: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    **changes: Any,
) -> dict[str, Any]:
    """The content of a ``sweep.json``."""
    points = []
    for place, (scorer, rule) in enumerate(methods):
        for keep in keeps:
            kept = round(keep * total)
            loss = loss_at(keep, 1 + 0.3 * place)
            points.append(
                {
                    "scorer": scorer,
                    "rule": rule,
                    "routing": "drop",
                    "target": "ragged",
                    "keep_asked": keep,
                    "keep": kept / total,
                    "kept": kept,
                    "bytes": round(dense_bytes * (1 - expert_share * (1 - kept / total))),
                    "quality": quality(loss),
                    "change": change(loss),
                    "generation": generation(loss) if keep in (0.8, 0.6) else None,
                    "meets_limit": loss <= 0.1,
                    "healthy": loss <= 0.2 if keep in (0.8, 0.6) else None,
                    "fits": None,
                }
            )
    within = [i for i, point in enumerate(points) if point["meets_limit"]]
    best = min(within, key=lambda i: points[i]["kept"]) if within else None
    document = {
        "format_version": 1,
        "verb": "sweep",
        "model": model,
        "fingerprint": fingerprint,
        "split": "Measured on 120 held-out examples of gsm8k-train.jsonl (31,204 tokens), none of them traced.",
        "limit": {"kind": "max_kl", "value": 0.1},
        "dense": {"quality": quality(0.0), "generation": generation(0.0), "bytes": dense_bytes},
        "points": points,
        "recommended": best,
        "smallest_within_limit": best,
        "reason": "The smallest selection within KL 0.1 whose answers are healthy.",
        "versions": VERSIONS,
        "seed": 0,
        "command": "shape-moe sweep Qwen/Qwen3-30B-A3B --trace traces/gsm8k --max-kl 0.1 -o sweeps/gsm8k",
    }
    return {**document, **changes}


def evaluation_document(
    *, model: str = "Qwen/Qwen3-30B-A3B", selection: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """The content of an ``evaluation.json``: a dense model and two pruned ones."""
    chosen = selection or {"scorer": "shape", "rule": "coverage", "routing": "drop", "keep": 0.6}
    rows = [
        _model(model, "dense", 0.0, 61_064_000_000, None),
        _model("Qwen3-gsm8k-0.6", "checkpoint", 0.14, 38_100_000_000, chosen),
        _model("selections/contribution.json", "mask", 0.11, 38_100_000_000, {**chosen, "scorer": "contribution"}),
    ]
    document = {
        "format_version": 1,
        "verb": "evaluate",
        "model": model,
        "data": "gsm8k-test.jsonl",
        "seed": 0,
        "versions": VERSIONS,
        "models": rows,
        "fingerprint": None,
        "command": "shape-moe evaluate Qwen/Qwen3-30B-A3B Qwen3-gsm8k-0.6 --data gsm8k-test.jsonl -o evaluation.json",
        "warnings": [],
        "faithfulness": [
            {
                "selection": "Qwen3-gsm8k-0.6",
                "kept": {"quality": quality(0.14), "change": change(0.14)},
                "inverted": {"quality": quality(4.9, exact=0.0), "change": change(4.9)},
                "random": [{"quality": quality(loss, exact=0.3), "change": change(loss)} for loss in (1.1, 1.3, 1.2)],
                "faithful": True,
            }
        ],
    }
    return {**document, **changes}


def _model(name: str, kind: str, loss: float, size: int, selection: dict[str, Any] | None) -> dict[str, Any]:
    dense = kind == "dense"
    classes = {
        label: {"quality": quality(loss * f), "change": change(loss * f)} for label, f in (("sum", 0.8), ("rate", 1.5))
    }
    return {
        "name": name,
        "kind": kind,
        "selection": selection,
        "bytes": size,
        "sets": {
            "task": {
                "quality": quality(loss),
                "change": None if dense else change(loss),
                "generation": generation(loss),
            },
            "also": {
                "quality": quality(3 * loss, exact=None),
                "change": None if dense else change(3 * loss, exact=None),
                "generation": None,
            },
        },
        "classes": None if dense else {"field": "kind", "worst": "rate", "by": classes},
        "tasks": {"gsm8k": {"exact_match,strict-match": estimate(0.89 - 0.4 * loss, 0.017)}},
        "footprint": {
            "load_seconds": 41.0 * size / 61e9,
            "peak_bytes": size + 3_000_000_000,
            "prefill_tokens_per_second": 9100.0 + 2000 * loss,
            "decode_tokens_per_second": 61.0 + 20 * loss,
            "device": "cuda (NVIDIA H200)",
            "dtype": "bfloat16",
            "workload": {"batch_size": 4, "prompt_tokens": 128, "new_tokens": 32, "repeats": 3},
        },
    }


def write_sweep(folder: Path, **options: Any) -> Path:
    """Write ``sweep.json`` into a folder."""
    return _write(folder, "sweep.json", sweep_document(**options))


def write_evaluation(folder: Path, **options: Any) -> Path:
    """Write ``evaluation.json`` into a folder."""
    return _write(folder, "evaluation.json", evaluation_document(**options))


def _write(folder: Path, name: str, document: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return folder / name
