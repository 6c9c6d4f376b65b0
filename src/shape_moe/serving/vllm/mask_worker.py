"""What runs inside a vLLM worker while selections are masks on the dense model: routers that know what is kept.

The class below is mixed into vLLM's worker (``worker_extension_cls``); its methods are called from outside through
``collective_rpc``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shape_moe.pruning.modeling_shape_moe import at_trained_scale

Choice = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""A router's ``select_experts``: hidden states and logits [T, E] to weights and ids [T, k]."""


def masked_choice(choose: Choice, kept: Sequence[int], total: int, routing: str, gate_scale: str) -> Choice:
    """A router's choice as the pruned model makes it, with ids of the dense model.

    Args:
        choose: the dense router's.
        kept: ids of the kept experts, ascending.
        total: experts of the dense model.
        routing: ``drop``: pruned experts are chosen and weigh nothing; ``reroute``: they cannot be chosen.
        gate_scale: under ``reroute``, ``survivors`` or ``trained``.
    """
    alive = torch.zeros(total, dtype=torch.bool)
    alive[list(kept)] = True
    tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def masked(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = router_logits.device
        if device not in tables:
            tables[device] = alive.to(device), torch.tensor(kept, dtype=torch.int64, device=device)
        living, ids_kept = tables[device]
        if routing == "drop":
            weights, ids = choose(hidden_states, router_logits, *args, **kwargs)
            return torch.where(living[ids.long()], weights, torch.zeros_like(weights)), ids
        logits = router_logits.masked_fill(~living, float("-inf"))
        weights, ids = choose(hidden_states, logits, *args, **kwargs)
        if gate_scale == "trained":
            weights = at_trained_scale(weights, router_logits, ids_kept)
        return weights, ids

    return masked


class MaskExtension:
    """Methods that a vLLM worker gains. Errors are handed over as text: one that is raised here ends the engine."""

    model_runner: Any

    def shape_moe_mask(
        self, layers: Mapping[str, Sequence[int]], total: int, routing: str, gate_scale: str
    ) -> str | None:
        """Answer as the pruned model from now on; the reason where a router of this worker cannot be masked."""
        try:
            from vllm.model_executor.layers.fused_moe.layer import MoERunner
        except ImportError:
            return (
                "This version of vLLM keeps its routers elsewhere; docs/serving.md names the versions that were tested."
            )
        self.shape_moe_unmask()
        runners = {m.layer_id: m for m in self.model_runner.model.modules() if isinstance(m, MoERunner)}
        for layer, kept in layers.items():
            runner = runners.get(int(layer))
            if runner is None:
                return f"This worker has no MoE layer {layer}: masks work without pipeline parallelism."
            if runner.is_monolithic:
                return (
                    f"Layer {layer} routes inside its kernel, where no mask reaches; choose another MoE backend, or "
                    "leave --engine vllm out."
                )
            runner.router.select_experts = masked_choice(runner.router.select_experts, kept, total, routing, gate_scale)
            self._shape_moe_masked.append(runner.router)
        return None

    def shape_moe_unmask(self) -> None:
        """Answer as the dense model again."""
        for router in self.__dict__.get("_shape_moe_masked", []):
            del router.select_experts
        self._shape_moe_masked: list[Any] = []
