"""A pruned model without this package: a copy of the original whose pruned experts add nothing, or are never chosen."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from support.family_models import EXPERTS, TinyFamily


def dropped(model: Any, made: TinyFamily, layers: Mapping[int, Sequence[int]]) -> Any:
    """The model whose pruned experts' last projection is zero."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer, ids in layers.items():
            experts = made.experts(made.decoder_layer(copied, layer))
            gone = [expert for expert in range(EXPERTS) if expert not in ids]
            experts.down_proj[gone] = 0
            if experts.has_bias:
                experts.down_proj_bias[gone] = 0
    return copied


def rerouted(model: Any, made: TinyFamily, layers: Mapping[int, Sequence[int]]) -> Any:
    """The model whose routers see minus infinity for pruned experts, in logits and in what is added for the choice."""
    copied = copy.deepcopy(model)
    for layer, ids in layers.items():
        place = made.decoder_layer(copied, layer)
        gone = torch.tensor([expert for expert in range(EXPERTS) if expert not in ids])
        block = made.block(place)
        with torch.no_grad():
            for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
                if "bias" in name and tensor.shape in ((EXPERTS,), (1, EXPERTS)):
                    tensor[..., gone] = -1e4
        router = made.router(place)
        router.forward = _without(router.forward, gone)
    return copied


def _without(forward: Any, gone: torch.Tensor) -> Any:
    def masked(*args: Any, **kwargs: Any) -> Any:
        real = torch.nn.functional.linear

        def linear(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            logits = real(value, weight, bias)
            if logits.shape[-1] == EXPERTS:
                logits[..., gone] = float("-inf")
            return logits

        torch.nn.functional.linear = linear
        try:
            return forward(*args, **kwargs)
        finally:
            torch.nn.functional.linear = real

    return masked


def at_trained_scale(model: Any, made: TinyFamily, layers: Mapping[int, Sequence[int]]) -> Any:
    """The model whose routers never choose pruned experts, and weigh the chosen ones by the softmax over all."""
    copied = copy.deepcopy(model)
    for layer, ids in layers.items():
        router = made.router(made.decoder_layer(copied, layer))
        router.forward = _choosing(router.forward, torch.tensor([i for i in range(EXPERTS) if i not in ids]))
    return copied


def _choosing(forward: Any, gone: torch.Tensor) -> Any:
    def masked(*args: Any, **kwargs: Any) -> Any:
        real = torch.topk

        def topk(values: torch.Tensor, *rest: Any, **named: Any) -> Any:
            hidden = values.clone()
            hidden[..., gone] = float("-inf")
            ids = real(hidden, *rest, **named).indices
            return values.gather(-1, ids), ids

        torch.topk = topk
        try:
            return forward(*args, **kwargs)
        finally:
            torch.topk = real

    return masked
