"""The configuration of a pruned checkpoint: the original's, with as little changed as possible."""

from __future__ import annotations

import copy
from typing import Any

from shape_moe.architectures.moe_config import PRUNING_KEY, MoeConfig
from shape_moe.errors import UsageError
from shape_moe.pruning.quantisation import QUANTISATION_KEY, Numbering, renumber_quantisation
from shape_moe.selection.selection import Selection

CODE_MODULE = "modeling_shape_moe"
"""Name of the Python file, and of the package's own module, that defines the classes of pruned models."""


def pruned_config(config: dict[str, Any], moe: MoeConfig, selection: Selection, target: str) -> dict[str, Any]:
    """The content of a pruned checkpoint's ``config.json``.

    Target ``ragged`` keeps every count, gains :data:`PRUNING_KEY` and the class ``Shape<Stock>``; target ``stock``
    keeps the class and gets a smaller count.

    Args:
        config: the original's content; not changed.
        moe: facts about the original.
        selection: what is kept.
        target: ``ragged`` or ``stock``.

    Raises:
        UsageError: when target ``stock`` is asked for a selection that is not equal counts with routing reroute.
        UnsupportedModelError: when the quantisation settings tell experts apart in a way that cannot be renumbered.
    """
    result = copy.deepcopy(config)
    result.pop("auto_map", None)
    if result.get("output_router_logits"):
        result["output_router_logits"] = False
    part = result if moe.family.config_part is None else result[moe.family.config_part]
    for key in moe.family.mtp_count_keys if moe.family.has_mtp_layers else ():
        for section in (result, part):
            if section.get(key):
                section[key] = 0
    if QUANTISATION_KEY in result:
        result[QUANTISATION_KEY] = renumber_quantisation(
            result[QUANTISATION_KEY], numbering(moe, selection), f"config.json, {QUANTISATION_KEY}"
        )
    if target == "stock":
        count = selection.equal_count
        if count is None or not selection.cuts_router:
            raise UsageError(
                "Target stock needs equal counts in every layer, routing reroute and gate scale survivors."
            )
        for key in moe.family.count_keys:
            if part.get(key) is not None:
                part[key] = [count] * len(part[key]) if isinstance(part[key], list) else count
        result["architectures"] = [moe.family.stock_class]
        return result
    from shape_moe.pruning.modeling_shape_moe import PREFIX

    name = PREFIX + moe.family.stock_class
    result["architectures"] = [name]
    result["auto_map"] = {moe.family.auto_class: f"{CODE_MODULE}.{name}"}
    result[PRUNING_KEY] = pruning_description(moe, selection)
    return result


def numbering(moe: MoeConfig, selection: Selection) -> Numbering:
    """Old and new numbers of the experts."""
    return Numbering(moe.family, selection.num_experts, selection.layers)


def up_to_date(description: Any) -> Any:
    """The content of :data:`PRUNING_KEY` as this version writes it, whichever version wrote it."""
    if isinstance(description, dict) and description.get("version") == 1:
        from shape_moe.pruning.modeling_shape_moe import VERSION

        return {**description, "version": VERSION, "gate_scale": "survivors"}
    return description


def pruning_description(moe: MoeConfig, selection: Selection) -> dict[str, Any]:
    """The content of :data:`PRUNING_KEY`."""
    from shape_moe.pruning.modeling_shape_moe import VERSION

    family = moe.family
    more = {
        "whole": list(family.router_whole),
        "block": family.block,
        "block_rows": list(family.block_rows),
    }
    return {
        "version": VERSION,
        "routing": selection.routing,
        "gate_scale": selection.gate_scale,
        "num_experts": selection.num_experts,
        "modules": {"experts": family.inside_block(family.experts), "router": family.inside_block(family.router)},
        **({"rows": more} if family.router_whole or family.block_rows else {}),
        "layers": {str(layer): list(ids) for layer, ids in selection.layers.items()},
    }
