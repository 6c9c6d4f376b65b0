"""A small grid that is judged by free answers alone, on the embedded model."""

from __future__ import annotations

from pathlib import Path

import yaml

from shape_moe.demo.tasks import examples
from support.data import write_lines


def write_grid(folder: Path, *, generate: int, **changes: object) -> Path:
    """Write the grid's file and its examples into a folder.

    Args:
        folder: where.
        generate: how many examples are answered.
        changes: other keys at the top of the file.
    """
    write_lines(folder / "sorting.jsonl", examples("sorting", 8 + generate, seed=5, held_out=True))
    content = {
        "models": [{"model": "embedded", "name": "tiny", "device": "cpu", "dtype": "float32"}],
        "calibration": {"sorting": {"data": "sorting.jsonl", "samples": 8}},
        "methods": ["shape/coverage"],
        "routings": ["drop", "reroute"],
        "keep": [0.5],
        "evaluation": {
            "sorts": {"data": "sorting.jsonl", "generate": generate, "metrics": ["generated_exact_match", "nll"]}
        },
        "output": "results",
        **changes,
    }
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file
