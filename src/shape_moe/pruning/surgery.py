"""Real surgery on a live model: the experts that a selection does not keep are gone, and so is their memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shape_moe.architectures.sites import live_moe_config
from shape_moe.pruning.masks import matching_sites
from shape_moe.pruning.model_config import pruning_description
from shape_moe.pruning.modeling_shape_moe import prune_in_place, pruned_class
from shape_moe.selection.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune_model(model: PreTrainedModel, selection: Selection) -> PreTrainedModel:
    """Cut a live model down to a selection, for good.

    Args:
        model: the full model; it is changed and must not be used as a full model afterwards.
        selection: what to keep.

    Returns:
        The same object, now of the class of pruned models: ``save_pretrained`` writes a ragged checkpoint.

    Raises:
        UsageError: when the selection does not fit the model.
    """
    matching_sites(model, selection)
    description = pruning_description(live_moe_config(model), selection)
    prune_in_place(model, description)
    model.config.shape_pruning = description
    model.__class__ = pruned_class(type(model))
    return model
