"""Serve-time pruning: the original checkpoint, unsliced, served with a selection applied."""

from __future__ import annotations

from os import PathLike
from typing import Any

from shape_moe.architectures.moe_config import PRUNING_KEY
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import UnsupportedModelError
from shape_moe.pruning.checkpoint import check_fits
from shape_moe.pruning.model_config import pruned_config
from shape_moe.selection.selection import Selection, open_selection
from shape_moe.serving.vllm.families import VLLM_FAMILIES
from shape_moe.serving.vllm.plan import ORIGINAL, SOURCE_KEY


def config_overrides(
    model: str | PathLike[str],
    selection: Selection | str | PathLike[str],
    *,
    revision: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """See :func:`shape_moe.serving.vllm.overrides`."""
    snapshot = open_snapshot(model, revision)
    family = snapshot.moe.family.model_type
    if family not in VLLM_FAMILIES:
        served = ", ".join(sorted(VLLM_FAMILIES))
        raise UnsupportedModelError(f"The vLLM plugin does not serve {family}; it serves {served}.")
    chosen = open_selection(selection, snapshot, force=force)
    check_fits(snapshot, chosen)
    pruned = pruned_config(snapshot.config, snapshot.moe, chosen, "ragged")
    pruned[PRUNING_KEY][SOURCE_KEY] = ORIGINAL
    del pruned["auto_map"]  # the code that travels with pruned checkpoints is for Transformers
    return {key: value for key, value in pruned.items() if snapshot.config.get(key) != value}
