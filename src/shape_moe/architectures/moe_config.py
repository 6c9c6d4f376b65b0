"""What a model's ``config.json`` says about its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shape_moe.architectures.families import FAMILIES, Family, family_names
from shape_moe.architectures.refused_families import REFUSED
from shape_moe.errors import UnsupportedModelError, UsageError

PRUNING_KEY = "shape_pruning"
"""The key that a pruned checkpoint's ``config.json`` gains; stock checkpoints do not have it."""

Config = Mapping[str, Any]

GateScale = Literal["survivors", "trained"]
"""How large gate weights are when experts leave a router that does not renormalise them over the top-k: ``survivors``
takes the softmax over the kept experts, so that weights grow by what was removed; ``trained`` takes it over all experts
of the original, so that weights keep the size that the model was trained with."""
GATE_SCALES: tuple[GateScale, ...] = get_args(GateScale)


@dataclass(frozen=True)
class RouterGroups:
    """Group-limited routing: ``count`` groups of equal size, of which a token may use ``used``."""

    count: int
    used: int


@dataclass(frozen=True)
class RouterFacts:
    """What a selection must know about routing.

    Attributes:
        top_k: experts per token.
        floor: fewest experts that a layer must keep when pruned experts leave the router.
        groups: router groups of equal size.
        renormalises: whether gate weights sum to one (times a constant) over the top-k.
    """

    top_k: int
    floor: int
    groups: int = 1
    renormalises: bool | None = None


@dataclass(frozen=True)
class MoeConfig:
    """The routed experts of a model as its configuration describes them.

    Attributes:
        family: facts about the family.
        num_layers: number of decoder layers, dense ones included.
        num_experts: routed experts per MoE layer (``E``).
        top_k: experts per token (``k``).
        groups: group-limited routing, None where a token may use any expert.
        renormalises: whether gate weights sum to one (times a constant) over the top-k.
        residual_scale: factor on the experts' output before it joins the residual stream.
        stream_scale: factor on the residual stream in that sum.
        block_scale: factor on the block's output in that sum; the rest of ``residual_scale`` lies inside the block.
    """

    family: Family
    num_layers: int
    num_experts: int
    top_k: int
    groups: RouterGroups | None
    renormalises: bool
    residual_scale: float
    stream_scale: float = 1.0
    block_scale: float = 1.0

    @property
    def router_scores(self) -> Literal["softmax", "sigmoid", "other"]:
        """How router logits become probabilities."""
        return self.family.router_scores

    @property
    def has_next_choice(self) -> bool:
        """Whether a router could choose one expert more than serve a token."""
        usable = self.num_experts
        if self.groups is not None:
            usable = self.groups.used * (self.num_experts // self.groups.count)
        return usable > self.top_k

    @property
    def has_gate_scale(self) -> bool:
        """Whether gate weights of the kept experts grow when others leave the router, without being renormalised."""
        return not self.renormalises and self.router_scores == "softmax"

    @property
    def routing(self) -> RouterFacts:
        """What a selection must know about this model's routing."""
        if self.groups is None:
            return RouterFacts(self.top_k, self.top_k, 1, self.renormalises)
        per_group = max(-(-self.top_k // self.groups.used), self.family.group_minimum)
        return RouterFacts(self.top_k, per_group * self.groups.count, self.groups.count, self.renormalises)


def check_gate_scale(scale: GateScale, family: Family | None, renormalises: bool | None) -> None:
    """Refuse gate scale ``trained`` where it would mean nothing.

    Args:
        scale: the gate scale.
        family: facts about the model's family, None where it is not known.
        renormalises: whether gate weights sum to one (times a constant) over the top-k, None where it is not known.

    Raises:
        UsageError: when the kept experts' weights do not grow by what leaves the router, or not as a softmax says.
    """
    if scale == "survivors":
        return
    why = None
    if family is not None and family.router_scores == "sigmoid":
        why = "its routers score every expert by itself (a sigmoid), so no weight depends on which others are there"
    elif family is not None and family.router_scores == "other":
        why = "its routers' weights are not those of one softmax over all experts, whose size could be kept"
    elif renormalises:
        why = "its routers renormalise the weights over the experts that serve a token"
    if why is not None:
        name = f" ({family.model_type})" if family is not None else ""
        raise UsageError(f"Gate scale trained means nothing for this model{name}: {why}; leave --gate-scale out.")


def find_family(config: Config) -> Family:
    """The facts about the family that a configuration belongs to.

    Raises:
        UnsupportedModelError: for a dense model, and for a model type that is not in the table.
    """
    model_type = str(config.get("model_type") or "(none)")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise UnsupportedModelError(f"Model type {model_type!r} cannot be pruned: {REFUSED[model_type]}.")
    if not _names_experts(config):
        raise UnsupportedModelError(f"This model ({model_type}) has no experts: there is nothing to prune.")
    code = foreign_code(config)
    own = f" The code that comes with it ({code}) cannot be used instead: its family is not known." if code else ""
    raise UnsupportedModelError(
        f"Model type {model_type!r} is not supported; supported: {family_names()}.{own} "
        "docs/add-a-model.md says how to add a family."
    )


def foreign_code(config: Config) -> str | None:
    """The class of its own that a configuration names for causal language models, None where it names none."""
    named = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    return named if isinstance(named, str) and PRUNING_KEY not in config else None


def _names_experts(config: Config) -> bool:
    """Whether a configuration of an unknown family speaks of experts, in itself or in one of its parts."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    keys = {str(key) for part in parts for key, value in part.items() if value}  # id2label is keyed by numbers
    return any("expert" in key or "moe" in key for key in (*keys, str(config.get("model_type"))))


def read_moe_config(config: Config) -> MoeConfig:
    """Read the facts about routed experts from a configuration (the content of ``config.json``).

    Raises:
        UnsupportedModelError: for an unknown family, a dense model or a checkpoint that is pruned already.
    """
    family = find_family(config)
    if PRUNING_KEY in config:
        raise UnsupportedModelError(
            "This checkpoint is already pruned with unequal expert counts; start from the original model."
        )
    part = family.language_part(config)
    num_experts = _first(part, family.count_keys)
    top_k = _first(part, family.top_k_keys)
    if not num_experts or not top_k:
        raise UnsupportedModelError(
            f"This model has no experts: its configuration ({family.model_type}) counts none, and there is nothing "
            "to prune."
        )
    renormalises = family.renormalises
    if isinstance(renormalises, str):
        renormalises = bool(part.get(renormalises, False))
    scales = (part.get(key, 1.0) for key in (family.residual_scale_key, family.routed_scale) if key is not None)
    return MoeConfig(
        family=family,
        num_layers=_num_layers(part, family),
        num_experts=num_experts,
        top_k=top_k,
        groups=_router_groups(part, family),
        renormalises=renormalises,
        residual_scale=math.prod(_factor(scale) for scale in scales),
        block_scale=_factor(part.get(family.residual_scale_key or "", 1.0)),
        stream_scale=float(part.get(family.stream_scale_key or "", 1.0)),
    )


_FACTORS = {"sum": 1.0, "average": 0.5}
"""What words say about how the experts' output and the shared expert's are put together."""


def _factor(value: Any) -> float:
    return _FACTORS[value] if isinstance(value, str) else float(value)


def _num_layers(part: Config, family: Family) -> int:
    listed = part.get(family.layer_list or "")
    return int(part["num_hidden_layers"]) if "num_hidden_layers" in part else len(listed or ())


def _first(config: Config, keys: tuple[str, ...]) -> int:
    values = [config[key] for key in keys if config.get(key) is not None]
    if not values:
        return 0
    return int(values[0][0] if isinstance(values[0], list) else values[0])


def _router_groups(config: Config, family: Family) -> RouterGroups | None:
    if family.group_keys is None or config.get("topk_method") == "greedy":
        return None
    count, used = (config.get(key) or 1 for key in family.group_keys)
    return RouterGroups(int(count), int(used)) if count > 1 else None
