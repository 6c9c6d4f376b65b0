"""Two hashes that say which model an artifact was made from."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypedDict

from shape_moe.architectures.weight_source import WeightSource
from shape_moe.errors import FingerprintError

UNVERIFIED = "unverified"
"""Fingerprint of a live model whose source is not known."""

_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "norm_topk_prob",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
    "n_group",
    "topk_group",
)


class Origin(TypedDict):
    """Which model an artifact was made from, under the names that artifacts record.

    Attributes:
        model: name of the model as the user gave it.
        revision: commit of a hub model.
        fingerprint: identifies the model by its routers.
        layout_fingerprint: describes the checkpoint's tensors.
    """

    model: str
    revision: str | None
    fingerprint: str
    layout_fingerprint: str


def origin(snapshot: WeightSource) -> Origin:
    """What an artifact records of the model on disk that it is made from."""
    return Origin(
        model=snapshot.name,
        revision=snapshot.revision,
        fingerprint=fingerprint(snapshot),
        layout_fingerprint=layout_fingerprint(snapshot),
    )


def fingerprint(snapshot: WeightSource) -> str:
    """Identify a model: sha256 over its routers' raw bytes and the config fields that routing depends on.

    It survives requantising and resharding, which leave routers alone, and differs for a fine-tune that moved them.
    """
    if "routers" not in snapshot.hashes:
        snapshot.hashes["routers"] = _hash_routers(snapshot)
    return snapshot.hashes["routers"]


def _hash_routers(snapshot: WeightSource) -> str:
    digest = hashlib.sha256()
    fields: dict[str, Any] = {key: snapshot.config.get(key) for key in _CONFIG_FIELDS}
    fields |= {"num_experts": snapshot.moe.num_experts, "top_k": snapshot.moe.top_k}
    digest.update(json.dumps(fields, sort_keys=True).encode())
    routers = sorted(name for name in snapshot.tensors if snapshot.role(name).role == "router")
    for name in routers:
        digest.update(name.encode())
        digest.update(snapshot.read(name))
    return f"sha256:{digest.hexdigest()}"


def layout_fingerprint(snapshot: WeightSource) -> str:
    """Describe a checkpoint's layout: sha256 over the sorted (name, dtype, shape) of all tensors."""
    rows = sorted((slot.name, slot.dtype, slot.shape) for slot in snapshot.tensors.values())
    return f"sha256:{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"


def check_fingerprint(made_from: str, model: str, what: str, *, force: bool = False) -> None:
    """Refuse an artifact that was made from another model.

    Args:
        made_from: the fingerprint that the artifact records.
        model: the fingerprint of the model at hand.
        what: the artifact, for the message ("The trace traces/math").
        force: accept an artifact of unknown origin.

    Raises:
        FingerprintError: when they differ, or when the origin is unknown and ``force`` is not set.
    """
    if made_from == UNVERIFIED:
        if not force:
            raise FingerprintError(
                f"{what} was made from a live model of unknown origin; use --force if you are sure that it is this one."
            )
    elif made_from != model:
        raise FingerprintError(
            f"{what} was made from another model: its routers differ, or the configuration of their routing "
            f"({made_from[7:19]} is not {model[7:19]}). Trace this model anew."
        )
