"""Tasks of lm-eval through its vLLM backend, in one process: reads a job, writes the results.

Run as ``python run_tasks.py JOB.json RESULT.json``. The job holds ``path``, ``tasks``, ``engine_args``
and ``selection`` (a file, or null).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shape_moe.evaluation.harness import TaskOptions, run_tasks_with_vllm
from shape_moe.process_exit import leave


def main() -> None:
    """Carry out one job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    options = TaskOptions(tuple(job["tasks"]), engine="vllm", engine_args=job["engine_args"])
    results = run_tasks_with_vllm(job["path"], options, selection=job["selection"])
    Path(sys.argv[2]).write_text(json.dumps({task: result.to_items() for task, result in results.items()}))
    leave(0)


if __name__ == "__main__":
    main()
