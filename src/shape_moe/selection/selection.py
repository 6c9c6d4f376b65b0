"""The selection: the experts that every layer keeps, as a small versioned JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.fingerprint import fingerprint
from shape_moe.architectures.moe_config import GateScale, MoeConfig, check_gate_scale
from shape_moe.architectures.same_routers import RouterHashes, check_same_model, router_hashes
from shape_moe.architectures.snapshot import Snapshot
from shape_moe.documents import MOST_EXPERTS, as_shape
from shape_moe.errors import CheckpointError, UsageError
from shape_moe.json_file import read_json
from shape_moe.selection.method import Method, Routing, check_gate_scale_name, check_routing
from shape_moe.units import counted, readable_share
from shape_moe.workspace import write_text

if TYPE_CHECKING:
    import polars as pl

FORMAT_VERSION = 2
"""Version 1 knew no gate scale: what was rerouted had ``survivors``."""
REFIT_IS_NOT_REPEATED = (
    "The selection is of a refitted model, but holds no weights: its experts are used as the original has them. To "
    "refit them again, start from the examples (--data, --refit on)."
)


@dataclass(frozen=True)
class Selection:
    """What is kept, and how it was chosen.

    Attributes:
        fingerprint: of the model that was traced, None for a selection made from a table of values.
        model: name of that model.
        family: its model type, None when unknown.
        scorer: the scorer's name.
        rule: the rule's name.
        routing: ``drop`` or ``reroute``.
        num_experts: routed experts per layer before pruning (``E``).
        top_k: experts per token (``k``), None when unknown.
        layers: kept expert ids by decoder-layer index, ascending.
        keep_asked: the keep rate that was asked for.
        alpha: smallest dropped priority under the coverage rule: keeping ``tau < alpha`` gives this selection.
            None under other rules, when constraints decided, or when it is tied with a kept one.
        constraints: what else was asked for; where the trace has several classes, their names and how they were joined
            (``classes``: ``names``, and ``joined``, which is ``maximum`` or ``pooled``).
        mass_kept: share of each layer's non-negative score mass that is kept, None for a layer without mass.
        stability: agreement of the two halves of the data, see :mod:`shape_moe.selection.stability`.
        near_ties: experts by layer, kept or not, that rounding alone could exchange; see
            :mod:`shape_moe.selection.near_ties`. None where nobody looked (a file of an older version).
        options: segment weights and seed used for scoring.
        warnings: what a user should know before pruning.
        choice: what was tried before this was chosen, where scorer or keep rate were left to the tool.
        refit: what is known of the kept experts' refitted down projections (``rho``, ``digest`` over their values),
            None where they are the model's own.
        seen: salted hashes of the prompts that it was made from, by their salt (see
            :class:`shape_moe.calibration.seen_prompts.SeenPrompts`); None where they are not known.
        gate_scale: ``survivors`` or ``trained``, see :data:`shape_moe.architectures.moe_config.GateScale`.
        routers: hashes of the model's router rows, by which it is recognised when it is stored otherwise (see
            :mod:`shape_moe.architectures.same_routers`); None in older files and for a table of values.
    """

    fingerprint: str | None
    model: str | None
    family: str | None
    scorer: str
    rule: str
    routing: Routing
    num_experts: int
    top_k: int | None
    layers: dict[int, list[int]]
    keep_asked: float
    alpha: float | None = None
    constraints: dict[str, Any] = field(default_factory=dict)
    mass_kept: dict[int, float | None] = field(default_factory=dict)
    stability: dict[str, float] | None = None
    near_ties: dict[int, list[int]] | None = None
    options: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    choice: dict[str, Any] | None = None
    refit: dict[str, Any] | None = None
    seen: dict[str, list[str]] | None = field(default=None, compare=False)  # every trace has a salt of its own
    gate_scale: GateScale = "survivors"
    routers: RouterHashes | None = None

    @property
    def kept(self) -> int:
        """Experts kept over all layers."""
        return sum(len(ids) for ids in self.layers.values())

    @property
    def total(self) -> int:
        """Experts before pruning over all layers."""
        return self.num_experts * len(self.layers)

    @property
    def keep(self) -> float:
        """The keep rate met."""
        return self.kept / self.total

    @property
    def equal_count(self) -> int | None:
        """Experts per layer when all layers keep the same number, else None."""
        counts = {len(ids) for ids in self.layers.values()}
        return counts.pop() if len(counts) == 1 else None

    @property
    def target(self) -> str:
        """What it was made for: ``ragged`` or ``stock``."""
        return str(self.constraints.get("target", "ragged"))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of examples that it was made for, none where there was but one."""
        return tuple((self.constraints.get("classes") or {}).get("names") or ())

    @property
    def pooled(self) -> bool:
        """Whether it was made from several classes added up, rather than joined by their maximum."""
        return (self.constraints.get("classes") or {}).get("joined") == "pooled"

    @property
    def method(self) -> Method:
        """How it was chosen."""
        return Method(self.scorer, self.rule, self.routing, self.target, self.gate_scale)

    @property
    def cuts_router(self) -> bool:
        """Whether the router loses the rows of pruned experts: not where it still needs them."""
        return self.routing == "reroute" and self.gate_scale == "survivors"

    @property
    def digest(self) -> str:
        """sha256 over what a model with this selection computes: experts, routing, gate scale, refitted weights."""
        refitted = [self.refit.get("digest")] if self.refit is not None else []
        content = json.dumps([self.method.routed, sorted(self.layers.items()), *refitted])
        return hashlib.sha256(content.encode()).hexdigest()

    def __repr__(self) -> str:
        return (
            f"Selection({str(self.method)!r}: keeps {self.kept:,} of {counted(self.total, 'expert')} "
            f"({readable_share(self.keep)}) in {counted(len(self.layers), 'layer')})"
        )

    def to_frame(self) -> pl.DataFrame:
        """One row per layer: how many experts it keeps, of how many, the share of its value kept, and their ids."""
        import polars as pl

        return pl.DataFrame(
            {
                "layer": list(self.layers),
                "kept": [len(ids) for ids in self.layers.values()],
                "of": [self.num_experts] * len(self.layers),
                "share of value kept": [self.mass_kept.get(layer) for layer in self.layers],
                "experts": list(self.layers.values()),
            },
            schema_overrides={"share of value kept": pl.Float64},
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.to_frame()._repr_html_()}"  # notebooks' own hook

    def mask(self) -> NDArray[np.bool_]:
        """Bool [L, E], True for kept; rows follow ``layers``."""
        mask = np.zeros((len(self.layers), self.num_experts), dtype=bool)
        for row, ids in enumerate(self.layers.values()):
            mask[row, ids] = True
        return mask

    def to_document(self) -> dict[str, Any]:
        """The JSON document."""
        document = asdict(self)
        document["layers"] = {str(layer): ids for layer, ids in self.layers.items()}
        if self.near_ties is not None:
            document["near_ties"] = {str(layer): ids for layer, ids in self.near_ties.items()}
        document["mass_kept"] = {str(layer): share for layer, share in self.mass_kept.items()}
        return {"format_version": FORMAT_VERSION, "keep_met": self.keep, **document}

    def save(self, file: str | Path) -> None:
        """Write the selection; the file is either old or new, never half."""
        write_text(Path(file), json.dumps(self.to_document(), indent=1) + "\n")


def layers_from_mask(layers: tuple[int, ...], mask: NDArray[np.bool_]) -> dict[int, list[int]]:
    """Kept ids by layer from a mask [L, E]."""
    return {layer: np.flatnonzero(row).tolist() for layer, row in zip(layers, mask, strict=True)}


def whole_selection(layers: Iterable[int], num_experts: int) -> Selection:
    """The selection that keeps everything, of no model in particular."""
    return Selection(
        fingerprint=None,
        model=None,
        family=None,
        scorer="none",
        rule="none",
        routing="drop",
        num_experts=num_experts,
        top_k=None,
        layers={layer: list(range(num_experts)) for layer in layers},
        keep_asked=1.0,
    )


def load_selection(path: str | PathLike[str]) -> Selection:
    """Read a selection file, or the one inside a pruned checkpoint's folder.

    Raises:
        CheckpointError: when it is missing, damaged or written by a newer version.
    """
    file = Path(path)
    file = file / "shape" / "selection.json" if file.is_dir() else file
    return selection_of(read_json(file), file)


def selection_of(document: Any, file: Path) -> Selection:
    """A selection out of its document.

    Args:
        document: the content of a selection file.
        file: where it is from, for messages.

    Raises:
        CheckpointError: when it is damaged or written by a newer version.
    """
    if not isinstance(document, dict):
        raise CheckpointError(f"{file} holds no selection.")
    if document.pop("format_version", None) not in (1, FORMAT_VERSION):
        raise CheckpointError(f"{file} is not a selection, or was written in another format version.")
    document.pop("keep_met", None)
    selection = as_shape(document, Selection, file, "a valid selection")
    try:
        check_selection(selection)
    except UsageError as error:
        raise CheckpointError(f"{file} is not a valid selection: {error}") from error
    return selection


def open_selection(given: str | PathLike[str] | Selection, snapshot: Snapshot, *, force: bool = False) -> Selection:
    """A selection for a model; one of unknown origin (from a table of values) is taken as it is.

    What a file says of a refit is left behind, with a warning: it holds no weights.

    Args:
        given: a file, a pruned checkpoint's folder, or a selection.
        snapshot: the model.
        force: accept one that was made from a live model.

    Raises:
        FingerprintError: when it was made from another model.
        CheckpointError: when it cannot be read.
    """
    chosen = given if isinstance(given, Selection) else load_selection(given)
    if type(chosen) is Selection and chosen.refit is not None:  # another class brings the weights along
        chosen = replace(chosen, refit=None, warnings=(*chosen.warnings, REFIT_IS_NOT_REPEATED))
    if chosen.fingerprint is not None:
        name = "The selection" if isinstance(given, Selection) else f"The selection {given}"
        told = check_same_model(chosen, snapshot, name, force=force)
        if told is not None:
            chosen = replace(chosen, warnings=(*chosen.warnings, told))
    return chosen


def completed(selection: Selection, snapshot: Snapshot) -> Selection:
    """A selection with what a table of values could not know about the model."""
    if selection.fingerprint is not None:
        return selection
    return replace(
        selection,
        fingerprint=fingerprint(snapshot),
        model=snapshot.name,
        family=snapshot.moe.family.model_type,
        top_k=snapshot.moe.top_k,
        routers=router_hashes(snapshot),
    )


def check_selection(selection: Selection) -> None:
    """Check that ids are sorted, different and in range, and that every layer keeps something.

    Raises:
        UsageError: naming the first layer that is wrong.
    """
    check_routing(selection.routing)
    check_gate_scale_name(selection.gate_scale)
    if selection.gate_scale == "trained" and (selection.routing != "reroute" or selection.target != "ragged"):
        raise UsageError("Gate scale trained goes with routing reroute and target ragged.")
    _check_ids(selection)
    if selection.routing == "reroute" and selection.top_k is not None:
        for layer, ids in selection.layers.items():
            if len(ids) < selection.top_k:
                raise UsageError(
                    f"Layer {layer} keeps {len(ids)} experts, fewer than the {selection.top_k} that a token needs; "
                    "use routing drop or keep more."
                )


def _check_ids(selection: Selection) -> None:
    if not selection.layers:
        raise UsageError("The selection has no layers.")
    if not 1 <= selection.num_experts <= MOST_EXPERTS or min(selection.layers) < 0:
        raise UsageError(f"Layers must not be negative, and have between 1 and {MOST_EXPERTS:,} experts.")
    if selection.top_k is not None and not 1 <= selection.top_k <= selection.num_experts:
        raise UsageError(f"A token cannot be served by {selection.top_k} of {selection.num_experts} experts.")
    for layer, ids in selection.layers.items():
        if not ids:
            raise UsageError(f"Layer {layer} keeps no expert.")
        if not all(type(expert) is int for expert in ids):
            raise UsageError(f"Layer {layer} must keep whole numbers.")
        if sorted(set(ids)) != list(ids) or ids[0] < 0 or ids[-1] >= selection.num_experts:
            raise UsageError(
                f"Layer {layer} must keep different ids between 0 and {selection.num_experts - 1}, ascending."
            )


def check_against_model(selection: Selection, moe: MoeConfig, layers: Iterable[int], routing: Routing) -> None:
    """Check that a selection describes a model's layers and experts, and that its routing can serve it.

    Args:
        selection: the selection.
        moe: the model's routed experts.
        layers: the model's MoE layers, of which the selection may name some.
        routing: how the selection is to be routed.

    Raises:
        UsageError: naming what does not fit.
    """
    check_routing(routing)
    if selection.num_experts != moe.num_experts:
        raise UsageError(
            f"The selection is for {selection.num_experts} experts per layer; the model has {moe.num_experts}."
        )
    unknown = set(selection.layers) - set(layers)
    if unknown:
        raise UsageError(f"The selection names layer {min(unknown)}, which is not an MoE layer of the model.")
    if routing == "reroute":
        check_gate_scale(selection.gate_scale, moe.family, moe.renormalises)
    facts = moe.routing
    if routing == "reroute" and moe.family.unrouted is not None:
        raise UsageError(
            f"{moe.family.model_type} cannot have routing reroute: {moe.family.unrouted}. Use routing drop."
        )
    for layer, ids in selection.layers.items() if routing == "reroute" else ():
        if len(ids) < facts.floor:
            raise UsageError(f"Layer {layer} keeps {len(ids)} experts; routing reroute needs at least {facts.floor}.")
        size = moe.num_experts // facts.groups
        if len({sum(expert // size == group for expert in ids) for group in range(facts.groups)}) > 1:
            raise UsageError(
                f"Layer {layer} keeps different numbers of experts in its {facts.groups} router groups, which "
                "routing reroute cannot serve; use routing drop, or select with this model's trace."
            )
