"""What Transformers loaded, held against what is on disk: a weight that is not there would be random."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.families import FAMILIES, QUANTISATION_SCALES
from shape_moe.architectures.moe_config import PRUNING_KEY
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 3
_MTP = re.compile(r"(?:^|\.)mtp\.")


def check_loaded(snapshot: Snapshot, model: PreTrainedModel, info: Mapping[str, Any]) -> str | None:
    """Refuse a model whose weights are not all the checkpoint's.

    What the class itself leaves aside, tied weights, and what the family's facts declare (layers for multi-token
    prediction, vision parts, quantisation scales) are no reason to refuse.

    Args:
        snapshot: what was loaded.
        model: the model.
        info: Transformers' loading info: names of missing, unexpected and mismatched tensors.

    Returns:
        One sentence that counts what was left aside, None where that is nothing.

    Raises:
        CheckpointError: naming the tensors.
    """
    kind = type(model).__name__
    kinds = {name: kind_left_aside(snapshot, name) for name in info["unexpected_keys"]}
    unexpected = [name for name, left_as in kinds.items() if left_as is None]
    faults = []
    if missing := info["missing_keys"]:
        faults.append(f"{_named(missing)} missing, and would be random")
    if mismatched := info["mismatched_keys"]:
        shapes = {
            name: f"{name} is {_shape(disk)} on disk and {_shape(live)} in the model" for name, disk, live in mismatched
        }
        faults.append(f"{_listed(sorted(shapes.values()))}")
    if unexpected:
        faults.append(f"{_named(unexpected)} unknown to {kind}")
    if faults:
        raise CheckpointError(
            f"{snapshot.name} cannot be loaded as it is: {'; '.join(faults)}. Download or copy the model again; if it "
            "was made by other software, its weights and config.json do not belong together."
        )
    return left_aside(snapshot, model)


def left_aside(snapshot: Snapshot, model: PreTrainedModel) -> str | None:
    """One sentence that counts the checkpoint's tensors that are no part of the live model, None without any."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]  # noqa: SLF001
    counts: Counter[str] = Counter()
    for name in snapshot.tensors:
        kind = kind_left_aside(snapshot, name)
        if kind is None and any(pattern.search(name) for pattern in ignored):
            kind = f"that {type(model).__name__} ignores"
        if kind is not None:
            counts[kind] += 1
    if not counts:
        return None
    parts = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"Tensors of {snapshot.name} that are no part of the loaded model, as expected: {parts}."


def kind_left_aside(snapshot: Snapshot, name: str) -> str | None:
    """As what a tensor on disk is left out of the live model by the family's facts, None where they do not say so."""
    family = FAMILIES.get(snapshot.config.get("model_type") or "")
    if family is None:
        return None
    pruned = PRUNING_KEY in snapshot.config  # it holds no layers past its last one
    if _MTP.search(name) or (not pruned and snapshot.role(name).layer >= snapshot.moe.num_layers):
        return "of multi-token-prediction layers" if family.has_mtp_layers else None
    if any(name.startswith(part) for part in family.vision):
        return "of vision parts"
    if snapshot.config.get("quantization_config") and name.endswith(QUANTISATION_SCALES):
        return "of quantisation scales"
    return None


def _named(names: Collection[str]) -> str:
    verb = "is" if len(names) == 1 else "are"
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun} ({_listed(sorted(names))}) {verb}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"
