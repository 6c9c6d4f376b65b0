"""The kept experts' down projections where they are not the model's own: what a refit gives, and a live model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.sites import MoeSite
from shape_moe.errors import UsageError
from shape_moe.selection.selection import Selection

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DownProjections:
    """One layer's down projections, a row for every kept expert in the order of their ids.

    Attributes:
        weight: [n, ...], every matrix laid out as in the live model (``down_proj``).
        bias: [n, H], None in families without one (``down_proj_bias``).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def named(self) -> dict[str, torch.Tensor]:
        """By the names of the live experts module's parameters."""
        found = {"down_proj": self.weight}
        return found if self.bias is None else {**found, "down_proj_bias": self.bias}


Weights = Mapping[int, DownProjections]
"""Down projections by decoder layer; layers that are not there keep the model's own."""


@dataclass(frozen=True)
class RefittedSelection(Selection):
    """A selection that brings the refitted weights of its experts along: a mask of it is the refitted model.

    Attributes:
        weights: the down projections.
    """

    weights: Weights = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, selection: Selection, weights: Weights, refit: dict[str, Any]) -> RefittedSelection:
        """A selection with weights, and what is known of them (see :attr:`Selection.refit`)."""
        known = {entry.name: getattr(selection, entry.name) for entry in fields(Selection)}
        return cls(**{**known, "refit": refit}, weights=weights)

    def plain(self) -> Selection:
        """The selection without the values, as it is written."""
        return Selection(**{entry.name: getattr(self, entry.name) for entry in fields(Selection)})

    def to_document(self) -> dict[str, Any]:
        """The JSON document, which holds no weights."""
        return self.plain().to_document()


class ReplacedRows:
    """Rows of a live module's parameters that hold other values for a while.

    Args:
        module: the module.
        rows: which rows of dimension 0.
        values: theirs, by the parameters' names.
    """

    def __init__(self, module: torch.nn.Module, rows: Sequence[int], values: Mapping[str, torch.Tensor]) -> None:
        import torch

        self._own: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            for name, value in values.items():
                tensor = getattr(module, name).data
                index = torch.tensor(rows, device=tensor.device)
                self._own.append((tensor, index, tensor[index]))
                tensor[index] = value.to(tensor)

    def remove(self) -> None:
        """Put the module's own values back, bit for bit."""
        import torch

        with torch.no_grad():
            for tensor, index, values in self._own:
                tensor[index] = values
        self._own.clear()


class _Nothing:
    def remove(self) -> None:
        """There is nothing to put back."""


def replaced_rows(site: MoeSite, kept: Sequence[int], weights: DownProjections) -> ReplacedRows | _Nothing:
    """Give a live layer's kept experts other down projections until they are removed.

    A layer that is read from disk when its turn comes, and is not in memory now, is left alone.

    Args:
        site: the layer.
        kept: ids of the kept experts, ascending.
        weights: theirs.

    Raises:
        UsageError: when the weights do not fit the layer, or its weights come and go on their own.
    """
    experts: Any = site.experts
    for name, value in weights.named().items():
        found = getattr(experts, name, None)
        if found is None or (len(kept), *found.shape[1:]) != tuple(value.shape):
            raise UsageError(
                f"The refitted weights do not fit layer {site.layer}: they were made for another model or selection."
            )
    if experts.down_proj.is_meta:
        if hasattr(experts, "_hf_hook"):
            raise UsageError(
                "Refitted weights need the experts in memory, but some are offloaded: use a device map without "
                "offloading."
            )
        return _Nothing()
    return ReplacedRows(experts, kept, weights.named())
