"""Gate scale ``trained`` inside vLLM: the router chooses among kept experts, with weights as all experts give them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from shape_moe.pruning.modeling_shape_moe import at_trained_scale
from shape_moe.serving.vllm.dropping import refuse_own_routing

BUFFER = "shape_moe_kept"


@cache
def _keeping_scale(router_class: type[Any]) -> type[Any]:
    class ScaleKeepingRouter(router_class):  # type: ignore[misc]  # a base class known at run time
        """The router with logits of the full model outside and those of kept experts inside."""

        shape_moe_kept: torch.Tensor

        def select_experts(
            self, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            kept = self.shape_moe_kept
            weights, places = super().select_experts(hidden_states, router_logits[..., kept], *args, **kwargs)
            return at_trained_scale(weights, router_logits, kept), places

    ScaleKeepingRouter.__name__ = ScaleKeepingRouter.__qualname__ = f"ScaleKeeping{router_class.__name__}"
    return ScaleKeepingRouter


def keep_scale(runner: Any, kept: Sequence[int], where: str) -> None:
    """Make an MoE layer of vLLM choose among kept experts, whose weights keep the size that they were trained with.

    Args:
        runner: the layer, built with ``len(kept)`` experts; its router gets a logit for every expert of the original.
        kept: ids of the original, ascending.
        where: the layer's name, for messages.

    Raises:
        ServingError: when the layer's kernel routes by itself, which would take the logits for those of kept experts.
    """
    refuse_own_routing(runner, where)
    ids = torch.tensor(kept, dtype=torch.int64, device=runner.moe_config.device)
    # A buffer, so that it moves and sleeps with the weights; the router is no module and only refers to it.
    runner.register_buffer(BUFFER, ids, persistent=False)
    router = runner.router
    kind: Any = type(router)
    router.__class__ = _keeping_scale(kind)
    router.shape_moe_kept = ids
