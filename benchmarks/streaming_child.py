"""One measured piece of work in a process of its own: ``python -m benchmarks.streaming_child REPORT LIMIT CASE ...``.

Before it begins, what all cases import is imported, so that memory is counted above the same interpreter. Anonymous
memory (``RssAnon``: everything but pages of files, which the system can drop at any time) is looked at all the time;
beyond the limit in bytes (0 for none) the process ends with code 137, as one does that a control group stops.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import peak_memory
from benchmarks.streaming_model import EXAMPLES

_EVERY = 0.02
_BEYOND = 137


def anonymous() -> int:
    """Bytes of anonymous memory that this process has in place."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Watch(threading.Thread):
    """Looks at anonymous memory all the time, and ends the process when it goes beyond a limit.

    Args:
        limit: bytes, 0 for no limit.

    Attributes:
        most: the most that was seen.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(daemon=True)
        self.limit, self.most = limit, 0

    def run(self) -> None:
        """Look."""
        while True:
            self.most = max(self.most, anonymous())
            if self.limit and self.most > self.limit:
                os._exit(_BEYOND)
            time.sleep(_EVERY)


def command(arguments: list[str]) -> None:
    """A command of shape-moe."""
    from shape_moe.cli.main import run

    code = run(arguments)
    if code:
        raise SystemExit(code)


def offload(arguments: list[str]) -> None:
    """The same trace of a model whose decoder layers accelerate keeps on disk."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import shape_moe
    from shape_moe.calibration.records import DataOptions
    from shape_moe.jobs.session import ExampleOptions

    model, data, out = map(Path, arguments)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" for layer in range(layers)}
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, device_map=places, offload_folder=str(out.with_name("offloaded"))
    )
    shape_moe.trace(
        loaded,
        ExampleOptions(DataOptions(str(data), samples=EXAMPLES)),
        out,
        tokenizer=AutoTokenizer.from_pretrained(model),
    )


def all_experts(arguments: list[str]) -> None:
    """Layer by layer, but every expert runs on every token as well, as some tools record experts; no statistics."""
    import torch

    from shape_moe.architectures.layered_model import LayeredModel
    from shape_moe.architectures.sites import find_sites
    from shape_moe.architectures.snapshot import open_snapshot
    from shape_moe.calibration.batches import batches
    from shape_moe.calibration.records import DataOptions
    from shape_moe.jobs.session import ExampleOptions, ModelSession
    from shape_moe.progress import SILENT
    from shape_moe.tracing.streams import Stream, run_streams

    folder, data, out = map(Path, arguments)
    session = ModelSession.open(
        open_snapshot(folder), ExampleOptions(DataOptions(str(data), samples=EXAMPLES)), None, SILENT
    )
    examples = session.calibrator.run(session.answerer, None)
    model = LayeredModel(open_snapshot(folder), device="cpu")

    def run_all(experts: Any, given: tuple[torch.Tensor, ...]) -> None:
        hidden = given[0]
        for both, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            gate, up = torch.nn.functional.linear(hidden, both).chunk(2, dim=-1)
            torch.nn.functional.linear(experts.act_fn(gate) * up, down)

    for site in find_sites(model.model):
        site.experts.register_forward_pre_hook(run_all)
    run_streams(model, list(batches(examples, session.options.answers.batch_size, 0)), [Stream("dense")], out)


CASES: dict[str, Callable[[list[str]], None]] = {"command": command, "offload": offload, "all-experts": all_experts}


def main() -> None:
    """Do the work, and report on it."""
    import accelerate  # noqa: F401  # what every case needs
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import shape_moe.jobs.prune
    import shape_moe.jobs.trace
    import shape_moe.tracing.layer_by_layer
    import shape_moe.tracing.transformers_model  # noqa: F401

    report, limit, case, *arguments = sys.argv[1:]
    base, base_anonymous, watch = peak_memory(), anonymous(), Watch(int(limit))
    watch.start()
    CASES[case](arguments)
    found = {
        "interpreter": base,
        "peak": peak_memory(),
        "anonymous_interpreter": base_anonymous,
        "anonymous_peak": watch.most,
        "from_disk": psutil.Process().io_counters().read_bytes,
    }
    Path(report).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
