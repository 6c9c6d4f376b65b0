"""The experts implementation that is installed while tracing.

It does what Transformers' ``grouped_mm`` does, in the same order, so that logits stay bit-identical; on the way it
sees every expert's output before weighting. Where a model cannot run ``grouped_mm``, the model's own ``eager``
forward gives the result, and the outputs are computed a second time for the statistics.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from shape_moe.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

    from shape_moe.tracing.recorder import LayerRecorder

TRACED_GROUPED = "shape_moe_traced_grouped_mm"
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What ``grouped_mm`` can multiply."""
RECORDER_ATTRIBUTE = "_shape_moe_recorder"


def register_traced_experts() -> None:
    """Make the traced implementation known to Transformers (once is enough, more does no harm)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(TRACED_GROUPED, traced_grouped_forward)


def recorder_of(module: nn.Module) -> LayerRecorder:
    """The recorder that was attached to an experts module."""
    recorder: LayerRecorder = getattr(module, RECORDER_ATTRIBUTE)
    return recorder


def traced_grouped_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward of an experts module: hidden [T, H], ids [T, k], weights [T, k] -> [T, H]."""
    outputs = expert_outputs(self, hidden_states, top_k_index)
    recorder = recorder_of(self)
    if recorder.recording:
        recorder.add(hidden_states, top_k_index, top_k_weights, outputs, partial(expert_outputs, self, hidden_states))
    weighted = outputs * top_k_weights.unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def expert_outputs(module: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Outputs of the chosen experts before weighting, [T, k, H], bit-identical to those inside ``grouped_mm``."""
    from transformers.integrations.moe import _grouped_linear

    if getattr(module, "_is_expert_parallel", False):
        raise UnsupportedModelError("Tracing does not work under expert parallelism; load the model without it.")
    top_k = ids.shape[-1]
    flat = ids.reshape(-1)
    sorted_ids, order = torch.sort(flat)
    bins = sorted_ids.float() if hidden.device.type in ("cpu", "mps") else sorted_ids.int()
    per_expert = torch.histc(bins, bins=module.num_experts, min=0, max=module.num_experts - 1)
    offsets = torch.cumsum(per_expert, dim=0, dtype=torch.int32)
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def project(value: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(module, f"{name}_bias")[sorted_ids] if module.has_bias else None
        weight = getattr(module, name)
        linear = _grouped_linear if value.dtype in GROUPED_DTYPES else _linear_by_expert
        result: torch.Tensor = linear(value, weight, offsets, bias=bias, is_transposed=module.is_transposed)
        return result

    value = project(hidden[order // top_k], first)
    value = module._apply_gate(value) if module.has_gate else module.act_fn(value)  # noqa: SLF001  # interface
    value = project(value, "down_proj")
    if getattr(module, "has_post_expert_norm", False):  # newer than the oldest supported Transformers
        value = module.post_expert_norm(value)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return value[inverse].view(*ids.shape, -1)


def _linear_by_expert(
    value: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    """The same as a grouped product, for dtypes that it does not know."""
    parts = torch.tensor_split(value, offsets[:-1].tolist())
    products = [part @ (w if is_transposed else w.T) for part, w in zip(parts, weight, strict=True)]
    result = torch.cat(products)
    return result if bias is None else result + bias
