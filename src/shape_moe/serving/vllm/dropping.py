"""Routing ``drop`` inside vLLM: the router chooses among all experts, and pruned ones contribute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from shape_moe.errors import ServingError

BUFFER = "shape_moe_slots"


def slot_table(kept: Sequence[int], total: int, device: torch.device | None = None) -> torch.Tensor:
    """The local id of every expert, -1 for a pruned one: int32 [total + 1].

    The last entry answers id -1, by which some kernels mark padding.
    """
    table = torch.full((total + 1,), -1, dtype=torch.int32, device=device)
    table[list(kept)] = torch.arange(len(kept), dtype=torch.int32, device=device)
    return table


def drop_slots(weights: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Translate a router's choice into local ids.

    A dropped slot repeats one of the token's surviving experts (the first expert where none survives) with weight
    zero: no output is computed that the token would not have had anyway, so nothing can overflow.

    Args:
        weights: float [T, k], gate weights.
        ids: int [T, k], ids of the full router.
        table: int32 [E + 1] from :func:`slot_table`.

    Returns:
        Weights [T, k] and local ids [T, k], both of the types that came in.
    """
    slots = table[ids.long()]
    alive = slots >= 0
    survivor = slots.amax(dim=-1, keepdim=True).clamp(min=0)
    local = torch.where(alive, slots, survivor).to(ids.dtype)
    return torch.where(alive, weights, torch.zeros_like(weights)), local


@cache
def _dropping(router_class: type[Any]) -> type[Any]:
    class DroppingRouter(router_class):  # type: ignore[misc]  # a base class known at run time
        """The router with ids of the full model inside (captures see those) and local ids outside."""

        shape_moe_slots: torch.Tensor

        def select_experts(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            weights, ids = super().select_experts(*args, **kwargs)
            return drop_slots(weights, ids, self.shape_moe_slots)

    DroppingRouter.__name__ = DroppingRouter.__qualname__ = f"Dropping{router_class.__name__}"
    return DroppingRouter


def drop_pruned(runner: Any, kept: Sequence[int], total: int, where: str) -> None:
    """Make an MoE layer of vLLM drop pruned experts.

    Args:
        runner: the layer, built with ``len(kept)`` experts.
        kept: ids of the full model, ascending.
        total: experts before pruning.
        where: the layer's name, for messages.

    Raises:
        ServingError: when the layer's kernel routes by itself, which would bypass the translation of ids.
    """
    refuse_own_routing(runner, where)
    table = slot_table(kept, total, runner.moe_config.device)
    # A buffer, so that it moves and sleeps with the weights; the router is no module and only refers to it.
    runner.register_buffer(BUFFER, table, persistent=False)
    router = runner.router
    kind: Any = type(router)
    router.__class__ = _dropping(kind)
    router.shape_moe_slots = table
    router.global_num_experts = total


def refuse_own_routing(runner: Any, where: str) -> None:
    """Refuse kernels that route by themselves, now or when one is chosen later.

    Raises:
        ServingError: when the layer's kernel is one.
    """
    if runner.is_monolithic:
        raise ServingError(_bypassed(where, runner))

    def refuse(*_: Any, **__: Any) -> Any:
        raise ServingError(_bypassed(where, runner))

    # Some kernels are chosen only when the weights are there; the server's first pass, before it answers, ends here.
    runner.routed_experts.forward_monolithic = refuse


def _bypassed(where: str, runner: Any) -> str:
    method = type(runner.routed_experts.quant_method).__name__
    return (
        f"The MoE kernel that vLLM chose for {where} ({method}) routes by itself and would bypass the pruning: choose "
        "another with --moe-backend, for instance triton."
    )
