"""Write the examples of the tiny experiment: tasks of the embedded model, prompts that its training never saw.

    python scripts/make_tiny_experiment_data.py [FOLDER]

Default folder: examples/tiny/data. The same files on every machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shape_moe.demo.tasks import examples

FOLDER = Path(__file__).parents[1] / "examples" / "tiny" / "data"
TASKS = ("addition", "sorting")
COUNT = 160
SEED = 20260701


def write_data(folder: Path) -> None:
    """One JSONL file per task, of which experiments use a part to calibrate and the rest to judge."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        records = examples(task, COUNT, seed=SEED, held_out=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write_data(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
