"""A trace that was made from another tool's file instead of a traced run."""

from __future__ import annotations

from typing import Any

from shape_moe.architectures.fingerprint import origin
from shape_moe.architectures.same_routers import router_hashes
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.made_with import versions
from shape_moe.tracing.trace import TraceInfo

UNKNOWN = "unknown"
"""Stands where a file does not say how the model was run."""


def converted_info(
    snapshot: Snapshot, *, engine: str, tokens: dict[str, float], examples: int, source: dict[str, Any]
) -> TraceInfo:
    """The provenance of a converted trace; it holds no text and no token ids.

    Args:
        snapshot: the model that the file is about, as the user names it.
        engine: what made the file.
        tokens: tokens by segment.
        examples: examples, 0 where the file does not tell them apart.
        source: where the file comes from.
    """
    return TraceInfo(
        **origin(snapshot),
        family=snapshot.moe.family.model_type,
        num_experts=snapshot.moe.num_experts,
        routing=snapshot.moe.routing,
        layers=snapshot.moe_layers,
        tokens=tokens,
        examples=examples,
        engine=engine,
        implementation=UNKNOWN,
        dtype=UNKNOWN,
        source=source,
        versions=versions("numpy", "polars"),
        routers=router_hashes(snapshot),
    )
