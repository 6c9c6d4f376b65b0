"""The model families that are known, by their model type. See ``docs/add-a-model.md``."""

from __future__ import annotations

from shape_moe.architectures.family import Family
from shape_moe.architectures.family_table import TABLE
from shape_moe.architectures.newer_families import NEWER

__all__ = ["FAMILIES", "QUANTISATION_SCALES", "Family", "family_names"]

QUANTISATION_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".input_scale", ".activation_scale")
"""Endings of the names of a quantised checkpoint's tensors that servers use and Transformers does not."""

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*TABLE, *NEWER)}


def family_names() -> str:
    """The supported families as a readable list, for messages."""
    return ", ".join(sorted(FAMILIES))
