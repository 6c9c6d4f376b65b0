"""Whether a model is the one that an artifact was made from, stored otherwise: its router rows say so.

A GGUF file, a quantised checkpoint and one in another dtype have other bytes than the model that was traced, and so
another fingerprint. Artifacts therefore hold a hash of every router's rows in each dtype that routers are stored in:
rows that were only stored in another one have the same hash there. Where hashes do not decide (the artifact is older,
the router itself is quantised), rows are compared with those of the model that was traced, if that is still at hand.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

from shape_moe.architectures.fingerprint import UNVERIFIED, check_fingerprint, fingerprint
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.errors import CheckpointError, FingerprintError, ShapeMoeError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

RouterHashes = dict[str, dict[str, dict[str, str]]]
"""By decoder layer, part of the router (``weight``, ``bias``) and dtype: ``F32``, ``F16`` and ``BF16``, with the dtype
in which the part is stored under ``stored``."""
STORED = "stored"
_HASHED = ("F32", "F16", "BF16")
_DIGITS = 32
_ROUNDING = {"F32": 2.0**-20, "BF16": 2.0**-8, "F16": 2.0**-10}
_COARSE = 2.0**-4
"""Largest difference, as a share of a row's largest weight, that storing it in a type may make; quantised ones last."""


class MadeFromModel(Protocol):
    """An artifact that says which model it was made from: a trace's info, or a selection."""

    @property
    def fingerprint(self) -> str | None:
        """The model's fingerprint."""

    @property
    def model(self) -> str | None:
        """The model's name."""

    @property
    def family(self) -> str | None:
        """The model's type."""

    @property
    def num_experts(self) -> int:
        """Routed experts per layer."""

    @property
    def top_k(self) -> int | None:
        """Experts per token."""

    @property
    def routers(self) -> RouterHashes | None:
        """Hashes of its router rows, None in older artifacts."""


def router_hashes(source: Snapshot) -> RouterHashes | None:
    """Hash a model's router rows, by layer, part and dtype; None where the routers themselves are quantised."""
    try:
        found: RouterHashes = {}
        for (layer, part), name in sorted(router_names(source).items()):
            slot = source.tensors[name]
            if slot.dtype not in _HASHED:
                return None
            values = source.values(slot, "dequantised")
            hashes = {kind: _hashed(values, kind) for kind in _HASHED}
            found.setdefault(str(layer), {})[part] = {STORED: slot.dtype, **hashes}
    except (CheckpointError, UnsupportedModelError):
        return None
    return found


def _hashed(values: torch.Tensor, kind: str) -> str:
    """The beginning of the sha256 over rows, rounded to a dtype."""
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    rows = values.to(dtypes[kind]).contiguous()
    content = rows.view(torch.uint8) if rows.ndim else rows.reshape(1).view(torch.uint8)
    return hashlib.sha256(f"{tuple(rows.shape)}".encode() + content.numpy().tobytes()).hexdigest()[:_DIGITS]


def check_same_model(made: MadeFromModel, snapshot: Snapshot, what: str, *, force: bool = False) -> str | None:
    """Refuse an artifact that was made from another model; the same model stored otherwise is recognised.

    Args:
        made: the artifact; its fingerprint is known.
        snapshot: the model at hand.
        what: the artifact, for messages.
        force: accept an artifact of unknown origin.

    Returns:
        A sentence that says how close the router rows are, None where fingerprints are equal.

    Raises:
        FingerprintError: when it was made from another model, or that cannot be found out.
    """
    own, made_from = fingerprint(snapshot), str(made.fingerprint)
    if made_from in (own, UNVERIFIED) or made.model is None or not _stored_otherwise(made, snapshot):
        check_fingerprint(made_from, own, what, force=force)
        return None
    differs = None
    if made.routers is not None:
        _check_facts(made, snapshot, what)
        differs, rounded = _compared_hashes(made.routers, snapshot)
        if differs is None:
            close = f"equal once rounded to {rounded}" if rounded else "equal"
            return f"{what} was made from {made.model}; its router rows and those of {snapshot.name} are {close}."
    try:
        original = open_snapshot(made.model)
        same = fingerprint(original) == made_from
    except ShapeMoeError as error:
        if differs is not None:
            raise FingerprintError(f"{what} was made from another model ({made.model}): {differs}.") from error
        raise FingerprintError(
            f"{what} was made from {made.model}, whose routers would be compared with those of {snapshot.name}, and it "
            f"cannot be opened: {error}"
        ) from error
    if not same:
        raise FingerprintError(f"{what} was made from {made.model} as it was before: its routers have changed since.")
    return _compared(original, snapshot, what)


def _stored_otherwise(made: MadeFromModel, snapshot: Snapshot) -> bool:
    """Whether the model at hand may be the artifact's although its fingerprint is another one."""
    if isinstance(snapshot, GgufModel) or snapshot.quantisation is not None:
        return True
    if made.routers is None:
        return False
    known = {entry[STORED] for parts in made.routers.values() for entry in parts.values()}
    return known != {snapshot.tensors[name].dtype for name in router_names(snapshot).values()}


def _check_facts(made: MadeFromModel, snapshot: Snapshot, what: str) -> None:
    """Whether family and counts are those of the model at hand."""
    moe = snapshot.moe
    facts = (made.family, made.num_experts, made.top_k)
    if facts != (moe.family.model_type, moe.num_experts, moe.top_k):
        raise FingerprintError(f"{what} was made from another model ({made.model}): layers or experts differ.")


def _compared_hashes(known: RouterHashes, snapshot: Snapshot) -> tuple[str | None, str]:
    """What of the router rows is another than the artifact's, None for nothing; and what they were rounded to."""
    names = router_names(snapshot)
    places = {(int(layer), part) for layer, parts in known.items() for part in parts}
    if places != names.keys():
        return "layers or experts differ", ""
    rounded = set()
    for (layer, part), name in sorted(names.items()):
        slot, entry = snapshot.tensors[name], known[str(layer)][part]
        if slot.dtype not in _HASHED:
            return f"the router of layer {layer} is stored as {slot.dtype}, in which it cannot be recognised", ""
        if _hashed(snapshot.values(slot, "dequantised"), slot.dtype) != entry.get(slot.dtype):
            return f"the router rows of layer {layer} differ", ""
        if slot.dtype not in (entry[STORED], "F32"):
            rounded.add(slot.dtype)
    return None, " and ".join(sorted(rounded))


def _compared(original: Snapshot, found: Snapshot, what: str) -> str:
    theirs, ours = router_names(original), router_names(found)
    facts = [(source.moe.family.model_type, source.moe.num_experts, source.moe.top_k) for source in (original, found)]
    if theirs.keys() != ours.keys() or facts[0] != facts[1]:
        raise FingerprintError(f"{what} was made from another model ({original.name}): layers or experts differ.")
    worst = 0.0
    for place, name in ours.items():
        kept, given = found.tensors[name], original.tensors[theirs[place]]
        if kept.shape != given.shape:
            raise FingerprintError(f"{what} was made from another model ({original.name}): its routers differ.")
        a, b = found.values(kept, "dequantised").double(), original.values(given, "dequantised").double()
        largest = b.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
        difference = float(((a - b).abs() / largest).max())
        if not difference <= _ROUNDING.get(kept.dtype, _COARSE):
            raise FingerprintError(
                f"{what} was made from another model ({original.name}): its routers differ by {difference:.1e} of a "
                f"row's largest weight (layer {place[0]}), more than storing them as {kept.dtype} can make."
            )
        worst = max(worst, difference)
    close = "equal" if worst == 0 else f"within {worst:.1e} of a row's largest weight"
    return f"{what} was made from {original.name}; its router rows and those of {found.name} are {close}."


def router_names(source: Snapshot) -> dict[tuple[int, str], str]:
    """The router tensors of a model by layer and part, whatever the layout calls them.

    Raises:
        CheckpointError: for a router part that the family's facts do not have.
    """
    found = {}
    for name in source.tensors:
        role = source.role(name)
        if role.role != "router":
            continue
        parts = [part for part in source.moe.family.router_rows if name.endswith(f".{part}")]
        if not parts:
            raise CheckpointError(f"{source.name}: router tensor {name} is not understood.")
        found[role.layer, parts[0]] = name
    return found
