"""Tasks of lm-eval through its vLLM backend, in one process: reads a job, writes the results.

Run as ``python run_tasks.py JOB.json RESULT.json``. The job holds ``path``, ``tasks`` and ``options`` of
``run_tasks_with_vllm``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shape_moe.evaluation.harness import run_tasks_with_vllm


def main() -> None:
    """Carry out one job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    results = run_tasks_with_vllm(job["path"], job["tasks"], **job["options"])
    Path(sys.argv[2]).write_text(json.dumps({task: asdict(result) for task, result in results.items()}))


if __name__ == "__main__":
    main()
