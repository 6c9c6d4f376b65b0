"""Tensor names on disk: which tensor belongs to which expert or router."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from shape_moe.architectures.families import Family

Role = Literal["expert", "packed", "router", "other"]

_ROW_PARTS = ("scales", "biases")
"""Parts of a quantised matrix that have its rows, in methods that quantise along the inputs (MLX)."""


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is to the pruner.

    Attributes:
        role: ``expert`` (belongs to one expert), ``packed`` (all experts of a layer on dimension 0), ``router``
            (one row per expert) or ``other`` (copied as it is).
        layer: decoder-layer index, -1 outside the decoder layers.
        expert: expert id for ``expert``, else -1.
        dimension: the dimension along which the experts lie, for ``packed`` and ``router``.
    """

    role: Role
    layer: int = -1
    expert: int = -1
    dimension: int = 0


DRAFTING = 10**6
"""Stands for the layer of tensors that belong to multi-token prediction under a name of their own."""
_DRAFTING = re.compile(r"^(?:model\.)?mtp\.")


@cache
def _layer(family: Family) -> str:
    """The beginning of the name of a decoder layer's tensor, with the layer's number as its second group."""
    return rf"((?:{'|'.join(re.escape(path) for path in family.layers)})\.)(\d+)\."


@cache
def _block(family: Family) -> str:
    """The path of the block, as checkpoints have it: in the original layout, or in that of the live model."""
    paths = dict.fromkeys((family.disk_block, family.block))
    beginnings = [re.escape(f"{path}.") if path else "" for path in paths]
    return f"(?:{'|'.join(beginnings)})"


@cache
def _router_rows(family: Family) -> frozenset[str]:
    """Tensors with one row per expert in the router, and the parts of quantised ones that have such rows too."""
    matrices = [row.removesuffix("weight") for row in family.router_rows if row.endswith(".weight")]
    return frozenset((*family.router_rows, *(row + part for row in matrices for part in _ROW_PARTS)))


@cache
def _patterns(family: Family) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    layer, block = f"^{_layer(family)}", _block(family)
    expert = re.compile(rf"{layer}{block}experts\.(\d+)\.(.+)$")
    packed = re.compile(rf"{layer}{block}(?:experts|switch_mlp)\.(\D.*)$")
    router = re.compile(rf"{layer}{block}(.+)$")
    return expert, packed, router


def tensor_role(family: Family, name: str) -> TensorRole:
    """Classify a tensor by its name on disk."""
    expert, packed, inside = _patterns(family)
    if family.has_mtp_layers and _DRAFTING.match(name):
        return TensorRole("other", DRAFTING)
    found = inside.match(name)
    if found is not None and found[3] in _router_rows(family):
        return TensorRole("router", int(found[2]), dimension=int(found[3] in family.router_columns))
    if match := expert.match(name):
        return TensorRole("expert", int(match[2]), int(match[3]))
    if (match := packed.match(name)) or (found is not None and found[3] in family.packed):
        return TensorRole("packed", int((match or found)[2]))  # type: ignore[index]  # one of them matched
    layer = re.match(f"^{_layer(family)}", name)
    return TensorRole("other", int(layer[2]) if layer else -1)


def down_projection(family: Family, name: str) -> Literal["down_proj", "down_proj_bias"] | None:
    """What of the experts' down projections a tensor is, by the live module's name for it; None for anything else.

    Only unquantised layouts are known: an expert's own matrix, a stack of all, and the live model's own.
    """
    expert, packed, inside = _patterns(family)
    if (match := expert.match(name)) and family.projections is not None:
        down = family.projections[2]
        return {f"{down}.weight": "down_proj", f"{down}.bias": "down_proj_bias"}.get(match[4])  # type: ignore[return-value]
    if match := packed.match(name):
        return match[3] if match[3] in ("down_proj", "down_proj_bias") else None  # type: ignore[return-value]
    if (match := inside.match(name)) and family.packed and match[3] == family.packed[-1]:
        return "down_proj"
    return None


def is_router_part(family: Family, name: str) -> bool:
    """Whether a tensor lies inside the router, known to the family's facts or not."""
    found = re.match(rf"^{_layer(family)}{_block(family)}{family.disk_router}\.(.+)$", name)
    return found is not None and found[3] not in family.router_whole


def renumbered(family: Family, name: str, new_id: int) -> str:
    """The name of one expert's tensor under another expert id."""
    pattern = rf"^({_layer(family)}{_block(family)}experts\.)\d+"
    return re.sub(pattern, rf"\g<1>{new_id}", name, count=1)
