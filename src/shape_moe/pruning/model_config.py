"""The configuration of a pruned checkpoint: the original's, with as little changed as possible."""

from __future__ import annotations

import copy
import re
from typing import Any

from shape_moe.architectures.moe_config import PRUNING_KEY, MoeConfig
from shape_moe.architectures.tensor_names import renumbered, tensor_role
from shape_moe.errors import UnsupportedModelError, UsageError
from shape_moe.selection.selection import Selection

CODE_MODULE = "modeling_shape_moe"
"""Name of the Python file, and of the package's own module, that defines the classes of pruned models."""

_NAME_LISTS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude")


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
        UnsupportedModelError: when the quantisation configuration names experts in a way that is not understood.
    """
    result = copy.deepcopy(config)
    result.pop("auto_map", None)
    if result.get("output_router_logits"):
        result["output_router_logits"] = False
    if moe.family.has_mtp_layers and result.get(moe.family.mtp_count_key):
        result[moe.family.mtp_count_key] = 0
    if "quantization_config" in result:
        result["quantization_config"] = _quantisation(result["quantization_config"], moe, selection)
    if target == "stock":
        count = selection.equal_count
        if count is None or selection.routing != "reroute":
            raise UsageError("Target stock needs equal counts in every layer and routing reroute.")
        for key in moe.family.count_keys:
            if result.get(key) is not None:
                result[key] = count
        result["architectures"] = [moe.family.stock_class]
        return result
    from shape_moe.pruning.modeling_shape_moe import PREFIX

    name = PREFIX + moe.family.stock_class
    result["architectures"] = [name]
    result["auto_map"] = {"AutoModelForCausalLM": f"{CODE_MODULE}.{name}"}
    result[PRUNING_KEY] = pruning_description(moe, selection)
    return result


def pruning_description(moe: MoeConfig, selection: Selection) -> dict[str, Any]:
    """The content of :data:`PRUNING_KEY`."""
    from shape_moe.pruning.modeling_shape_moe import VERSION

    family = moe.family
    return {
        "version": VERSION,
        "routing": selection.routing,
        "num_experts": selection.num_experts,
        "modules": {"experts": f"{family.block}.{family.experts}", "router": f"{family.block}.{family.router}"},
        "layers": {str(layer): list(ids) for layer, ids in selection.layers.items()},
    }


def _quantisation(quantisation: dict[str, Any], moe: MoeConfig, selection: Selection) -> dict[str, Any]:
    """Rewrite lists of module names: entries of pruned experts go, those of kept experts get their new id."""
    result = dict(quantisation)
    for key in _NAME_LISTS:
        if isinstance(result.get(key), list):
            renamed = [_renamed(name, moe, selection) for name in result[key]]
            result[key] = [name for name in renamed if name is not None]
    return result


def _renamed(name: Any, moe: MoeConfig, selection: Selection) -> Any:
    if not isinstance(name, str):
        return name
    if name.startswith("re:") and re.search(r"experts\\?\.\d", name):
        raise UnsupportedModelError(
            f"The quantisation configuration names single experts by the pattern {name!r}, which cannot be renumbered; "
            "replace it by plain module names."
        )
    role = tensor_role(moe.family, f"{name}.weight")
    if role.role != "expert" or role.layer not in selection.layers:
        return name
    kept = selection.layers[role.layer]
    return renumbered(moe.family, name, kept.index(role.expert)) if role.expert in kept else None
