"""What the serving benchmark asks of vLLM's workers."""

from __future__ import annotations

from typing import Any


class Measuring:
    """Methods that a worker gains."""

    model_runner: Any

    def expert_bytes(self) -> int:
        """Bytes of allocated parameters of routed experts."""
        return sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in self.model_runner.model.named_parameters()
            if ".experts." in name
        )

    def count_slots(self, experts: int) -> None:
        """Count from now on how often each expert is routed to."""
        import torch
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self._slots: dict[int, Any] = {}
        for module in self.model_runner.model.modules():
            if isinstance(module, MoERunner):
                counts = self._slots[module.layer_id] = torch.zeros(experts, dtype=torch.int64)
                module.router.set_capture_fn(
                    lambda ids, counts=counts: counts.add_(torch.bincount(ids.flatten().long(), minlength=experts))
                )

    def slot_counts(self) -> list[list[int]]:
        """Counts by layer."""
        return [self._slots[layer].tolist() for layer in sorted(self._slots)]
