"""Whether a GGUF file is the model that an artifact was made from in Transformers: its router rows say so."""

from __future__ import annotations

from shape_moe.architectures.fingerprint import UNVERIFIED, check_fingerprint, fingerprint
from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.snapshot import Snapshot, open_snapshot
from shape_moe.errors import CheckpointError, FingerprintError, ShapeMoeError

_ROUNDING = {"F32": 2.0**-20, "BF16": 2.0**-8, "F16": 2.0**-10}
_COARSE = 2.0**-4
"""Largest difference, as a share of a row's largest weight, that storing it in a type may make; quantised ones last."""


def check_same_model(
    made_from: str, model: str | None, snapshot: Snapshot, what: str, *, force: bool = False
) -> str | None:
    """Refuse an artifact that was made from another model; one from the same model's folder is right for its GGUF file.

    Args:
        made_from: the fingerprint that the artifact records.
        model: the model that it records, which is opened where fingerprints differ.
        snapshot: the model at hand.
        what: the artifact, for messages.
        force: accept an artifact of unknown origin.

    Returns:
        A sentence that says how close the router rows are, None where fingerprints are equal.

    Raises:
        FingerprintError: when it was made from another model, or that cannot be found out.
    """
    own = fingerprint(snapshot)
    if not isinstance(snapshot, GgufModel) or made_from in (own, UNVERIFIED) or model is None:
        check_fingerprint(made_from, own, what, force=force)
        return None
    try:
        original = open_snapshot(model)
        same = fingerprint(original) == made_from
    except ShapeMoeError as error:
        raise FingerprintError(
            f"{what} was made from {model}, whose routers would be compared with those of {snapshot.name}, and it "
            f"cannot be opened: {error}"
        ) from error
    if not same:
        raise FingerprintError(f"{what} was made from {model} as it was before: its routers have changed since.")
    return _compared(original, snapshot, what)


def _compared(original: Snapshot, gguf: GgufModel, what: str) -> str:
    theirs, ours = router_names(original), router_names(gguf)
    facts = [(source.moe.family.model_type, source.moe.num_experts, source.moe.top_k) for source in (original, gguf)]
    if theirs.keys() != ours.keys() or facts[0] != facts[1]:
        raise FingerprintError(f"{what} was made from another model ({original.name}): layers or experts differ.")
    worst = 0.0
    for place, name in ours.items():
        kept, given = gguf.tensors[name], original.tensors[theirs[place]]
        if kept.shape != given.shape:
            raise FingerprintError(f"{what} was made from another model ({original.name}): its routers differ.")
        a, b = gguf.values(kept, "dequantised").double(), original.values(given, "dequantised").double()
        largest = b.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
        difference = float(((a - b).abs() / largest).max())
        if not difference <= _ROUNDING.get(kept.dtype, _COARSE):
            raise FingerprintError(
                f"{what} was made from another model ({original.name}): its routers differ by {difference:.1e} of a "
                f"row's largest weight (layer {place[0]}), more than storing them as {kept.dtype} can make."
            )
        worst = max(worst, difference)
    close = "equal" if worst == 0 else f"within {worst:.1e} of a row's largest weight"
    return f"{what} was made from {original.name}; its router rows and those of {gguf.name} are {close}."


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
