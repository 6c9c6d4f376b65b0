"""What a model takes in memory and on disk, at every keep rate, from configuration and headers alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import Any

from shape_moe.architectures.config_file import with_text_part
from shape_moe.architectures.weight_source import WeightSource

PRECISION_BITS = {"as stored": None, "bf16": 16.0, "fp8": 8.0, "int4": 4.25}
"""Bits per weight of matrices in decoder layers; embeddings, norms and routers stay as stored. int4 counts scales."""

USABLE_SHARE = 0.9
"""Share of a device's memory for weights and KV cache; the rest is for activations and the runtime (servers reserve
about a tenth by default)."""


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model, by what pruning can change.

    Attributes:
        experts: bytes of all routed experts.
        routers: bytes of all routers.
        other: bytes of everything else that a pruned checkpoint keeps.
        dropped: bytes that no pruned checkpoint keeps (multi-token-prediction layers).
        num_experts: routed experts over all layers.
        expert_values: number of weights in the routed experts.
        matrix_values: number of weights in other matrices of the decoder layers.
        matrix_bytes: bytes of those.
        dtypes: bytes by dtype on disk.
    """

    experts: int
    routers: int
    other: int
    dropped: int
    num_experts: int
    expert_values: int
    matrix_values: int
    matrix_bytes: int
    dtypes: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of the whole checkpoint."""
        return self.experts + self.routers + self.other + self.dropped

    def at_keep(self, kept: int, precision: str = "as stored") -> float:
        """Bytes of weights with ``kept`` routed experts (routers whole) at a precision."""
        share = kept / self.num_experts
        bits = PRECISION_BITS[precision]
        if bits is None:
            return self.experts * share + self.routers + self.other
        rest = self.other - self.matrix_bytes + self.matrix_values * bits / 8
        return self.expert_values * share * bits / 8 + self.routers + rest

    def most_kept(self, budget: float, precision: str = "as stored") -> int:
        """The largest number of routed experts whose weights take at most ``budget`` bytes; may be negative."""
        per_expert = (self.at_keep(self.num_experts, precision) - self.at_keep(0, precision)) / self.num_experts
        return min(self.num_experts, int((budget - self.at_keep(0, precision)) // per_expert))


def measure(snapshot: WeightSource) -> ModelSize:
    """Add the sizes of a model's tensors up."""
    layers = snapshot.moe_layers
    sums: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, slot in snapshot.tensors.items():
        role = snapshot.role(name)
        dtypes[slot.dtype] += slot.size
        if role.layer >= snapshot.moe.num_layers:
            sums["dropped"] += slot.size
        elif role.role in ("expert", "packed"):
            sums["experts"] += slot.size
        elif role.role == "router":
            sums["routers"] += slot.size
        else:
            sums["other"] += slot.size
    for tensor in snapshot.plain_or_stored:
        role = snapshot.role(tensor.name)
        if role.layer >= snapshot.moe.num_layers or role.role == "router":
            continue
        if role.role in ("expert", "packed"):
            sums["expert_values"] += tensor.count
        elif role.layer >= 0 and tensor.is_matrix:
            sums["matrix_values"] += tensor.count
            sums["matrix_bytes"] += tensor.size
    return ModelSize(
        experts=sums["experts"],
        routers=sums["routers"],
        other=sums["other"],
        dropped=sums["dropped"],
        num_experts=snapshot.moe.num_experts * len(layers),
        expert_values=sums["expert_values"],
        matrix_values=sums["matrix_values"],
        matrix_bytes=sums["matrix_bytes"],
        dtypes=dict(dtypes),
    )


def kv_cache_bytes(config: dict[str, Any], context: int, concurrency: int, *, bits: int = 16) -> int:
    """Bytes of KV cache for ``concurrency`` sequences of ``context`` tokens.

    Counts latent attention (one compressed vector per token) and sliding windows; layers without attention hold none.
    """
    config = with_text_part(config)
    window = config.get("sliding_window") or context
    lengths = {"full": context, "sliding": min(context, window), "none": 0}
    per_layer = _kv_layer(config, bits)
    return concurrency * per_layer * int(sum(lengths[kind] for kind in _layer_kinds(config)))


def _kv_layer(config: dict[str, Any], bits: int) -> int:
    if config.get("kv_lora_rank"):
        values = int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
    else:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        values = 2 * int(config.get("num_key_value_heads") or heads) * head_dim
    return ceil(values * bits / 8)


def _layer_kinds(config: dict[str, Any]) -> list[str]:
    listed = config.get("layers_block_type")
    if isinstance(listed, list) and "num_hidden_layers" not in config:
        return ["full" if kind in ("attention", "full_attention") else "none" for kind in listed]
    layers = int(config["num_hidden_layers"])
    names = {"full_attention": "full", "sliding_attention": "sliding"}
    if isinstance(config.get("layer_types"), list):
        return [names.get(kind, "none") for kind in config["layer_types"][:layers]]
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    return ["sliding" if windowed else "full"] * layers
