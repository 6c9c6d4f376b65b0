"""What ``make test-gpu`` runs: trace, stream, masks, pruning and the vLLM plugin on CUDA, with a JSON file of results.

Where there is no CUDA, it says so and ends well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from shape_moe.demo.doctor import diagnose

RESULTS = Path(__file__).parents[1] / "results" / "gpu_check.json"
ENGINE_TESTS = "tests/engines/test_checkpoints.py"
NO_CUDA = "torch sees no CUDA device here, so nothing was run on a GPU: make test-gpu is skipped."


def main(arguments: list[str] | None = None) -> int:
    """Run everything and write the results.

    Returns:
        1 when something fails, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stdout.write(NO_CUDA + "\n")
        return 0
    found = diagnose("cuda")
    plugin = vllm_plugin()
    document = {
        "card": torch.cuda.get_device_name(0),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "cuda": torch.version.cuda,
        "date": datetime.now(UTC).date().isoformat(),
        **found.to_document(),
        "vllm_plugin": plugin,
    }
    given.output.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(
        "\n".join([*found.lines(), f"vLLM plugin: {plugin['result']}", f"wrote {given.output.name}"]) + "\n"
    )
    return 0 if found.passed and plugin["result"] in ("passed", "not run") else 1


def vllm_plugin() -> dict[str, Any]:
    """Serve pruned checkpoints with the vLLM of this environment, where it has one, by the tests of the engines."""
    if find_spec("vllm") is None:
        return {"result": "not run", "why": "vLLM is not installed in this environment"}
    try:
        known = version("vllm")
    except PackageNotFoundError:
        known = "unknown"
    done = subprocess.run(  # this very interpreter
        [sys.executable, "-m", "pytest", "-q", ENGINE_TESTS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    return {"result": "passed" if done.returncode == 0 else "failed", "version": known, "said": last}


if __name__ == "__main__":
    sys.exit(main())
