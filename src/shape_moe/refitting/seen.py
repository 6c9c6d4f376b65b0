"""What a layer shows of itself while batches go through it: the stream that feeds it, and what its experts receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.sites import MoeSite
from shape_moe.errors import UnsupportedModelError
from shape_moe.refitting.solver import ExpertRows

if TYPE_CHECKING:
    import torch


@contextmanager
def entering_stream(site: MoeSite, keep: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Have ``keep`` called with the residual stream that feeds the block [B, T, H]."""

    def hook(_module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        keep(args[0])

    handle = site.residual_norm.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class ExpertInputs:
    """Collects the rows of the kept experts, batch by batch; use it inside :meth:`attached`.

    Attributes:
        site: the layer.
        kept: ids of its kept experts, ascending.
    """

    site: MoeSite
    kept: Sequence[int]
    _parts: list[list[ExpertRows]] = field(default_factory=list)
    _row_of: torch.Tensor | None = None

    def __post_init__(self) -> None:
        experts: Any = self.site.experts
        if getattr(experts, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                "A refit is not possible for this family: a norm follows each expert's down projection, so that the "
                "layer's output is not linear in it."
            )
        self._parts = [[] for _ in self.kept]

    @contextmanager
    def attached(self) -> Iterator[ExpertInputs]:
        """Watch the experts module; a mask must be in place already."""
        handle = self.site.experts.register_forward_pre_hook(self._add)
        try:
            yield self
        finally:
            handle.remove()

    def start(self, row_of: torch.Tensor) -> None:
        """The next call is a batch's.

        Args:
            row_of: int64 [B * T], the row of the problem that a token is, -1 for padding.
        """
        self._row_of = row_of

    def rows(self) -> list[ExpertRows]:
        """What every kept expert has seen, in the order of their ids."""
        import torch

        def joined(parts: list[ExpertRows], name: str) -> torch.Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        found = []
        for parts in self._parts:
            found.append(ExpertRows(*(joined(parts, name) for name in ("tokens", "gates", "inputs"))))
            parts.clear()
        return found

    def _add(self, module: torch.nn.Module, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        import torch

        hidden, ids, gates = args
        assert self._row_of is not None
        rows = self._row_of.to(hidden.device)
        served = (gates != 0) & (rows >= 0).unsqueeze(1)
        order = torch.argsort(torch.where(served, ids, -1).flatten(), stable=True)
        in_order = torch.where(served, ids, -1).flatten()[order]
        bounds = torch.searchsorted(in_order, torch.tensor([*self.kept], device=ids.device))
        ends = torch.searchsorted(in_order, torch.tensor([*self.kept], device=ids.device), right=True)
        for place, (expert, begin, end) in enumerate(zip(self.kept, bounds.tolist(), ends.tolist(), strict=True)):
            slots = order[begin:end]
            tokens = slots // ids.shape[1]
            with torch.no_grad():
                inputs = down_inputs(module, expert, hidden[tokens])
            self._parts[place].append(ExpertRows(rows[tokens], gates.flatten()[slots], inputs))


def down_inputs(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What enters one expert's down projection [n, I] for hidden states [n, H], in the model's dtype."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, first)[expert]
    value = hidden @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        value = value + getattr(module, f"{first}_bias")[expert]
    found: torch.Tensor = module._apply_gate(value) if module.has_gate else module.act_fn(value)  # noqa: SLF001
    return found
