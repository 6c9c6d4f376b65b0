"""What a configuration asks the server to prune."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shape_moe.architectures.families import FAMILIES, Family
from shape_moe.architectures.moe_config import GATE_SCALES, PRUNING_KEY, GateScale
from shape_moe.errors import ServingError
from shape_moe.pruning.modeling_shape_moe import VERSION
from shape_moe.selection.method import Routing
from shape_moe.serving.vllm.families import VLLM_FAMILIES, VllmFamily

SOURCE_KEY = "source"
"""Entry of ``shape_pruning`` that says what is on disk: absent for a pruned checkpoint, :data:`ORIGINAL` for the
original, of which the server loads the kept experts alone."""
ORIGINAL = "original"


@dataclass(frozen=True)
class ServingPlan:
    """A pruned model as the server must build it.

    Attributes:
        family: facts about the family.
        facts: where vLLM keeps it.
        routing: ``drop`` or ``reroute``.
        num_experts: experts per layer before pruning.
        layers: kept ids by decoder-layer index.
        num_layers: number of decoder layers.
        from_original: whether the checkpoint on disk is the original.
        gate_scale: ``survivors`` or ``trained``.
    """

    family: Family
    facts: VllmFamily
    routing: Routing
    num_experts: int
    layers: Mapping[int, tuple[int, ...]]
    num_layers: int
    from_original: bool
    gate_scale: GateScale = "survivors"

    @property
    def cuts_router(self) -> bool:
        """Whether routers lose the rows of pruned experts."""
        return self.routing == "reroute" and self.gate_scale == "survivors"

    def kept(self, layer: int) -> int:
        """Experts that a layer keeps; a layer that is not pruned keeps all."""
        return len(self.layers[layer]) if layer in self.layers else self.num_experts

    def router_rows(self, layer: int) -> int:
        """Experts that a layer's router has a logit for."""
        return self.kept(layer) if self.cuts_router else self.num_experts

    def choices(self, layer: int) -> int:
        """Experts that a layer's router chooses among."""
        return self.kept(layer) if self.routing == "reroute" else self.num_experts


def read_plan(config: Any) -> ServingPlan:
    """Read the plan from a Transformers configuration.

    Raises:
        ServingError: when the configuration is not that of a pruned model, or is written in a newer format.
    """
    pruning = getattr(config, PRUNING_KEY, None)
    family = str(getattr(config, "model_type", ""))
    if pruning is None or family not in VLLM_FAMILIES:
        raise ServingError(
            f"The architecture is that of a pruned model, but the configuration has no {PRUNING_KEY} for a family that "
            f"this plugin serves ({', '.join(sorted(VLLM_FAMILIES))})."
        )
    source, scale = pruning.get(SOURCE_KEY), pruning.get("gate_scale", "survivors")
    known = pruning.get("version") in (1, VERSION) and source in (None, ORIGINAL) and scale in GATE_SCALES
    if not known or pruning.get("routing") not in ("drop", "reroute"):
        raise ServingError("This pruned checkpoint was written in a newer format: update shape-moe on the server.")
    plan = ServingPlan(
        family=FAMILIES[family],
        facts=VLLM_FAMILIES[family],
        routing=pruning["routing"],
        num_experts=int(pruning["num_experts"]),
        layers={int(layer): tuple(ids) for layer, ids in pruning["layers"].items()},
        num_layers=int(config.num_hidden_layers),
        from_original=source == ORIGINAL,
        gate_scale=scale,
    )
    counts = {getattr(config, key) for key in _count_keys(plan, config)}
    if counts != {plan.num_experts}:
        raise ServingError(
            f"The configuration counts {sorted(counts)} experts, {PRUNING_KEY} {plan.num_experts}: they must agree."
        )
    return plan


def _count_keys(plan: ServingPlan, config: Any) -> list[str]:
    return [key for key in plan.family.count_keys if getattr(config, key, None) is not None]


@contextmanager
def expert_count(plan: ServingPlan, config: Any, count: int) -> Iterator[None]:
    """Let the configuration count ``count`` experts for a while: vLLM reads it layer by layer."""
    keys = _count_keys(plan, config)
    try:
        for key in keys:
            setattr(config, key, count)
        yield
    finally:
        for key in keys:
            setattr(config, key, plan.num_experts)
