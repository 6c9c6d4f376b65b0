"""Which model families are known, and what can be done with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shape_moe.architectures.families import FAMILIES, Family
from shape_moe.architectures.gguf_architectures import ARCHITECTURES
from shape_moe.architectures.refused_families import REFUSED
from shape_moe.serving.vllm.families import VLLM_FAMILIES

Grade = Literal["full", "structure tested", "refused"]


@dataclass(frozen=True)
class FamilySupport:
    """What is supported of a family.

    Attributes:
        model_type: ``config.json``'s ``model_type``.
        grade: ``full``: traced, cut, written and loaded again, each tested on a tiny model; ``structure tested``: its
            experts can be cut, and have no statistics; ``refused``.
        model_class: its class in Transformers, None for refused ones.
        remarks: what does not work, as sentences; of a refused family, why.
        vllm: whether the vLLM plugin serves it with different counts in its layers.
        gguf: whether its GGUF files are read and written.
    """

    model_type: str
    grade: Grade
    model_class: str | None
    remarks: tuple[str, ...]
    vllm: bool = False
    gguf: bool = False


def families() -> tuple[FamilySupport, ...]:
    """Every family that is known, the best supported first, then by name."""
    in_gguf = {known.family for known in ARCHITECTURES.values()}
    found = [
        FamilySupport(
            family.model_type,
            "full" if family.untraceable is None else "structure tested",
            family.stock_class,
            tuple(_remarks(family)),
            family.model_type in VLLM_FAMILIES,
            family.model_type in in_gguf,
        )
        for family in FAMILIES.values()
    ]
    found += [FamilySupport(name, "refused", None, (f"{why[0].upper()}{why[1:]}.",)) for name, why in REFUSED.items()]
    order: tuple[Grade, ...] = ("full", "structure tested", "refused")
    return tuple(sorted(found, key=lambda support: (order.index(support.grade), support.model_type)))


def _remarks(family: Family) -> list[str]:
    remarks = []
    if family.untraceable is not None:
        remarks.append(f"Not traced: {family.untraceable}.")
    if family.unrouted is not None:
        remarks.append(f"Routing drop only: {family.unrouted}.")
    if family.not_layered is not None:
        remarks.append(f"Not read layer by layer: {family.not_layered}.")
    if family.why_no_refit is not None:
        remarks.append(f"No refit: {family.why_no_refit}.")
    if family.router_scores == "other":
        remarks.append("No replacement scores: its router's scores depend on the experts chosen before.")
    if family.config_part is not None:
        remarks.append("Calibrated by text; the parts for images are left alone.")
    return remarks
