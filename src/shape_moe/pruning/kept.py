"""What a pruned checkpoint keeps of each tensor: the one rule for files that are sliced and weights that are served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shape_moe.architectures.families import Family
from shape_moe.architectures.tensor_names import renumbered, tensor_role


@dataclass(frozen=True)
class Keeping:
    """A selection as tensors see it.

    Attributes:
        family: facts about the family.
        num_layers: number of decoder layers.
        layers: kept expert ids by decoder-layer index, ascending; other layers keep everything.
        cuts_router: whether routers lose the rows of pruned experts.
    """

    family: Family
    num_layers: int
    layers: Mapping[int, Sequence[int]]
    cuts_router: bool

    def dimension(self, name: str) -> int:
        """Along which dimension the experts of a tensor lie that is cut."""
        return tensor_role(self.family, name).dimension

    def tensor(self, name: str) -> tuple[str, Sequence[int] | None] | None:
        """What becomes of a tensor of the original.

        Args:
            name: its name on disk.

        Returns:
            Its name in the pruned checkpoint and the rows that it keeps, along :meth:`dimension` (None for all of
            them); None for a tensor that is left behind: those of dropped experts, and of layers for multi-token
            prediction, whose experts were not traced and which no loader needs.
        """
        role = tensor_role(self.family, name)
        if role.layer >= self.num_layers:
            return None
        kept = self.layers.get(role.layer)
        if kept is None:
            return name, None
        if role.role == "expert":
            return (renumbered(self.family, name, kept.index(role.expert)), None) if role.expert in kept else None
        cut = role.role == "packed" or (role.role == "router" and self.cuts_router)
        return name, kept if cut else None
