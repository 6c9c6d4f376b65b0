"""The proof that a pruned checkpoint is the masked original: the same logits for the same sequences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shape_moe.architectures.loading import (
    find_tokenizer,
    load_model,
    loaded_bytes,
    why_not_loadable,
)
from shape_moe.architectures.plain_model import why_not_observable
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.errors import CheckpointError
from shape_moe.progress import Progress
from shape_moe.pruning.canary import Canary, CanaryResult, canary_tokens, compare_canary, record_canary
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection
from shape_moe.units import readable_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def why_no_logits(snapshot: Snapshot, device: str, dtype: str) -> str | None:
    """Why the original's logits cannot be had on this machine, None where they can."""
    reason = why_not_observable(snapshot) or why_not_loadable(loaded_bytes(snapshot, dtype), device)
    return f"the original was not loaded: {reason}" if reason else None


def masked_answers(snapshot: Snapshot, model: PreTrainedModel, selection: Selection, progress: Progress) -> Canary:
    """Record the canary: what the original answers under the mask of a selection.

    Raises:
        CheckpointError: when the original's logits are not finite.
    """
    with progress.phase("Recording the canary", 1, "step") as advance:
        tokens = canary_tokens(model, find_tokenizer(snapshot))
        with masked(model, selection):
            canary = record_canary(model, tokens)
        advance(1)
    return canary


def check_logits(canary: Canary, path: Path, device: str, dtype: str, progress: Progress) -> CanaryResult:
    """Load a pruned checkpoint and compare its answers with the canary.

    Raises:
        CheckpointError: when they differ by more than rounding.
    """
    pruned = open_snapshot(path)
    with progress.phase("Comparing logits", 1, "step") as advance:
        result = compare_canary(load_model(pruned, device=device, dtype=dtype), canary)
        advance(1)
    if not result.passed:
        raise CheckpointError(
            f"The pruned model's logits differ from the masked original's (KL {result.mean_kl:.2g}, top-1 agreement "
            f"{readable_share(result.top1_agreement)}): the checkpoint is not what it should be. It stays in {path}."
        )
    return result
