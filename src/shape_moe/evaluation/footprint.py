"""What a model takes: memory, loading time and speed, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from shape_moe.errors import ShapeMoeError, UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UPS = 1
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Workload:
    """The fixed workload of a speed measurement.

    Attributes:
        batch_size: sequences at once.
        prompt_tokens: tokens of each prompt (prefill).
        new_tokens: tokens written after it (decode).
        repeats: how often both are timed; medians count.

    Raises:
        UsageError: for numbers below 1.
    """

    batch_size: int = 4
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, not {value}.")


@dataclass(frozen=True)
class Footprint:
    """A model's needs on one machine.

    Attributes:
        device: where it ran.
        dtype: in which dtype.
        load_seconds: from files to a model that answers, files in the page cache or not.
        peak_bytes: largest memory in use while loading and running: on a GPU what torch allocated, on the CPU the
            the most by which the process's resident size grew.
        prefill_tokens_per_second: prompt tokens, median.
        decode_tokens_per_second: new tokens, all sequences together, median.
        workload: what was timed.
    """

    device: str
    dtype: str
    load_seconds: float
    peak_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    workload: dict[str, int]

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Footprint:
        """What :meth:`to_document` described."""
        return cls(
            device=str(found["device"]),
            dtype=str(found.get("dtype") or ""),
            load_seconds=float(found["load_seconds"]),
            peak_bytes=int(found["peak_bytes"]),
            prefill_tokens_per_second=float(found["prefill_tokens_per_second"]),
            decode_tokens_per_second=float(found["decode_tokens_per_second"]),
            workload=dict(found.get("workload") or {}),
        )


def measure_footprint(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    workload: Workload | None = None,
    trust_remote_code: bool = False,
) -> Footprint:
    """Load a checkpoint in a new process and time a fixed workload there.

    Args:
        path: the checkpoint.
        device: where to run.
        dtype: in which dtype.
        workload: what to time.
        trust_remote_code: run the code that comes with the model, where there is some.

    Raises:
        ShapeMoeError: when the process fails; the message carries its last line.
    """
    job = {
        "path": str(path),
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "workload": asdict(workload or Workload()),
    }
    done = subprocess.run(
        [sys.executable, "-m", "shape_moe.evaluation.footprint"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ShapeMoeError(f"Memory and speed of {path} could not be measured: {last}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def _measure(job: dict[str, Any]) -> Footprint:
    import torch
    import transformers  # noqa: F401 -- imported before memory is read, as every model needs it

    from shape_moe.architectures.loading import input_device, load_model
    from shape_moe.architectures.snapshot import open_snapshot

    snapshot, workload = (
        open_snapshot(job["path"], trust_remote_code=job["trust_remote_code"]),
        Workload(**job["workload"]),
    )
    began = time.perf_counter()
    with _PeakMemory() as memory:
        model = load_model(snapshot, device=job["device"], dtype=job["dtype"])
        device = input_device(model)
        load_seconds = time.perf_counter() - began
        prefill, decode = _time(model, workload)
    on_gpu = device.type == "cuda"
    gpus = range(torch.cuda.device_count()) if on_gpu else ()
    return Footprint(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        dtype=str(model.dtype).removeprefix("torch."),
        load_seconds=load_seconds,
        peak_bytes=sum(map(torch.cuda.max_memory_allocated, gpus)) if on_gpu else memory.peak,
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        workload=asdict(workload),
    )


class _PeakMemory:
    """Watches the resident size of this process: the most that it grows by inside the block."""

    def __init__(self) -> None:
        import psutil

        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._process.memory_info().rss
        self.peak = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, self._process.memory_info().rss - self._before)
            self._done.wait(_SAMPLE_SECONDS)


def _time(model: PreTrainedModel, workload: Workload) -> tuple[float, float]:
    """Prompt tokens and new tokens per second: medians over the repeats, after a warm-up."""
    from statistics import median

    import torch

    from shape_moe.architectures.loading import input_device, vocabulary_size

    device = input_device(model)
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, workload.prompt_tokens)
    ids = torch.randint(0, vocabulary_size(model), shape, generator=generator).to(device)
    prefills, decodes = [], []
    for repeat in range(_WARM_UPS + workload.repeats):
        prefill, decode = run_once(model, ids, workload.new_tokens)
        if repeat >= _WARM_UPS:
            prefills.append(ids.numel() / prefill)
            decodes.append(workload.batch_size * workload.new_tokens / decode)
    return median(prefills), median(decodes)


def run_once(model: PreTrainedModel, ids: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill, and of ``new_tokens`` greedy steps after it."""
    import torch

    began = _now(ids.device)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        between = _now(ids.device)
        for _ in range(new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return between - began, _now(ids.device) - between


def _now(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _main() -> int:
    try:
        found = _measure(json.loads(sys.stdin.read()))
    except (ShapeMoeError, RuntimeError, OSError, MemoryError) as error:
        sys.stderr.write(f"{first_line(error)}\n")
        return 1
    sys.stdout.write(json.dumps(found.to_document()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
