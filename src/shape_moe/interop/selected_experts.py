"""The reference implementation's file of selected experts: ``{"0": [ids], ..., "_metadata": {...}}``.

It says what every layer keeps, by which method, and how much; not for which model, nor with which routing. The method
that it was published with leaves routers alone: routing ``drop``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import DataError, UsageError
from shape_moe.interop.reference import METADATA, read_layers
from shape_moe.selection.selection import Selection, check_against_model, check_selection

Default = TypeVar("Default", float, None)

_SCORERS = {"shapley": "shape"}
_RULES = {"alpha_per_layer": "coverage"}
"""Their names and ours, where they differ; other names are kept as they are."""
_KNOWN = {"method", "strategy", "target_rate", "actual_rate", "total_experts", "selected_experts", "alpha"}


def read_selected(file: Path, snapshot: Snapshot | None = None) -> Selection:
    """Read a file of selected experts.

    Args:
        file: the file.
        snapshot: the model that it is for, which the selection is then bound to; without it the selection has no
            fingerprint, and the number of experts comes from the file's metadata.

    Raises:
        DataError: when the file contradicts itself or the model, or nothing says how many experts there are.
    """
    layers, metadata = read_layers(file)
    for layer, ids in layers.items():
        if not isinstance(ids, list) or any(type(expert) is not int for expert in ids):
            raise DataError(f"{file}: layer {layer} must be a list of expert ids.")
        ids.sort()
    experts = _num_experts(file, layers, metadata, snapshot)
    kept, total = sum(len(ids) for ids in layers.values()), experts * len(layers)
    selection = Selection(
        fingerprint=fingerprint(snapshot) if snapshot else None,
        model=snapshot.name if snapshot else None,
        family=snapshot.moe.family.model_type if snapshot else None,
        scorer=_name(file, metadata, "method", _SCORERS),
        rule=_name(file, metadata, "strategy", _RULES),
        routing="drop",
        num_experts=experts,
        top_k=snapshot.moe.top_k if snapshot else None,
        layers=layers,
        keep_asked=_number(file, metadata, "target_rate", 1, kept / total),
        alpha=_number(file, metadata, "alpha", 2, None),
        warnings=_left_out(metadata),
    )
    for key, found in (("selected_experts", kept), ("total_experts", total)):
        if metadata.get(key, found) != found:
            raise DataError(f"{file}: its metadata promises {key} {metadata[key]}, but there are {found}.")
    try:
        check_selection(selection)
        if snapshot:
            check_against_model(selection, snapshot.moe, snapshot.moe_layers, selection.routing)
    except UsageError as error:
        raise DataError(f"{file}: {error}") from error
    return selection


def selected_text(selection: Selection) -> str:
    """A selection as the content of a file of selected experts; routing and constraints have no place in it."""
    document: dict[str, Any] = {str(layer): ids for layer, ids in selection.layers.items()}
    document[METADATA] = {
        "method": {ours: theirs for theirs, ours in _SCORERS.items()}.get(selection.scorer, selection.scorer),
        "strategy": {ours: theirs for theirs, ours in _RULES.items()}.get(selection.rule, selection.rule),
        "target_rate": selection.keep_asked,
        "actual_rate": selection.keep,
        "total_experts": selection.total,
        "selected_experts": selection.kept,
        "alpha": selection.alpha,
    }
    return json.dumps(document, indent=2)


def _num_experts(file: Path, layers: dict[int, list[int]], metadata: dict[str, Any], snapshot: Snapshot | None) -> int:
    if snapshot is not None:
        return snapshot.moe.num_experts
    total = metadata.get("total_experts")
    if type(total) is not int or total <= 0 or total % len(layers):
        raise DataError(f"{file} does not say how many experts a layer has; name the model with --model.")
    return total // len(layers)


def _name(file: Path, metadata: dict[str, Any], key: str, ours: dict[str, str]) -> str:
    name = metadata.get(key, "unknown")
    if not isinstance(name, str):
        raise DataError(f"{file}: {key} must be a name, not {name!r}.")
    return ours.get(name, name)


def _number(file: Path, metadata: dict[str, Any], key: str, most: float, default: Default) -> float | Default:
    number = metadata.get(key)
    if number is None:
        return default
    if type(number) not in (int, float) or not 0 <= number <= most:
        raise DataError(f"{file}: {key} must be a number between 0 and {most:g}, not {number!r}.")
    return float(number)


def _left_out(metadata: dict[str, Any]) -> tuple[str, ...]:
    extra = sorted(set(metadata) - _KNOWN)
    return (f"The file's metadata also had {', '.join(extra)}, which a selection does not keep.",) if extra else ()
