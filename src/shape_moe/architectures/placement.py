"""Where a model's weights lie: a device by its name, or a map from its parts to devices, host memory and disk."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.errors import UsageError

if TYPE_CHECKING:
    import torch

MAP = "map:"
"""A device that begins so is a device map."""
AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Maps that accelerate makes by the memory that is free."""


def is_map(device: str) -> bool:
    """Whether a device is a device map: ``map:auto``, or ``map:FILE``."""
    return device.startswith(MAP)


def placement(device: str) -> dict[str, Any]:
    """How Transformers is told where a model's weights go; empty for host memory.

    Args:
        device: ``auto`` (GPUs where there are some, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ..., ``map:`` and one
            of :data:`AUTOMATIC_MAPS`, or ``map:`` and a JSON file that maps names of the model's parts to GPUs by their
            number, ``cpu`` and ``disk``.

    Raises:
        UsageError: for an unknown device, and a map that cannot be read.
    """
    import torch

    if is_map(device):
        return {"device_map": _device_map(device.removeprefix(MAP))}
    if device == "auto":
        return {"device_map": "auto"} if torch.cuda.is_available() else {}
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"There is no device {device!r}; use auto, cpu, cuda or cuda:N.") from error
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"Device {device} was asked for, but torch sees {torch.cuda.device_count()} GPUs.")
    return {} if kind == "cpu" else {"device_map": {"": device}}


def with_offload_folder(options: dict[str, Any]) -> dict[str, Any]:
    """The same with a temporary folder for what a map puts on disk; it goes when the process ends."""
    if "device_map" not in options:
        return options
    folder = tempfile.mkdtemp(prefix="shape-moe-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {**options, "offload_folder": folder}


def computing_device(device: str) -> torch.device:
    """Where one layer at a time computes: ``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        UsageError: for an unknown device, and for a device map.
    """
    import torch

    if is_map(device):
        raise UsageError(
            "--device-map says where all layers lie at once, --stream has one of them in memory: leave one of the two "
            "out."
        )
    placement(device)
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(device)


def _device_map(named: str) -> str | dict[str, str | int]:
    if named in AUTOMATIC_MAPS:
        return named
    advice = (
        f"--device-map is one of {', '.join(AUTOMATIC_MAPS)}, or a JSON file such as "
        '{"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk", ...}'
    )
    try:
        found = json.loads(Path(named).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{advice}; {named} cannot be read.") from error
    except ValueError as error:
        raise UsageError(f"{advice}; {named} holds no JSON.") from error
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{advice}; {named} holds something else.")
    for part, place in found.items():
        if isinstance(place, bool) or not isinstance(place, str | int):
            raise UsageError(f"{advice}; {named} puts {part} on {place!r}.")
    return found
