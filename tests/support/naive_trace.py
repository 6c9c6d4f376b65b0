"""A trace the slow way: one token and one expert at a time, in float64, from what the experts module received."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from shape_moe.calibration.batches import FOLDS, PADDING, Batch
from support.tiny_models import moe_block, router_of


@dataclass
class Captured:
    """What one MoE layer saw in one forward pass."""

    hidden: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor
    residual: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def capture(model, batch: Batch) -> dict[int, Captured]:
    """Run a plain forward pass and keep the inputs of every experts module.

    The residual stream is taken as the layer's output minus the block's output: not from the norm that the
    family's facts name.
    """
    found: dict[int, Captured] = {}
    handles = []
    blocks: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        block = moe_block(layer)
        if not hasattr(block, "experts"):
            continue
        scale = getattr(layer, "residual_multiplier", 1.0)

        def keep_inputs(_module, args, number=number):
            found[number] = Captured(*(a.detach().clone() for a in args))

        def keep_block(_module, _args, output, number=number, scale=scale):
            blocks[number] = scale * (output[0] if isinstance(output, tuple) else output)

        def keep_layer(_module, _args, output, number=number):
            output = output[0] if isinstance(output, tuple) else output
            found[number].residual = (output.double() - blocks[number].double()).flatten(0, 1)

        def keep_logits(_module, _args, output, number=number):
            blocks[-1 - number] = output[0].detach().clone()

        handles += [
            block.experts.register_forward_pre_hook(keep_inputs),
            block.register_forward_hook(keep_block),
            layer.register_forward_hook(keep_layer),
            router_of(layer).register_forward_hook(keep_logits),
        ]
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    for number, captured in found.items():
        captured.logits = blocks[-1 - number].reshape(len(captured.ids), -1)
    return found


def expert_output(experts, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Output of one expert for one token in float64."""
    transposed = experts.is_transposed
    up = experts.gate_up_proj[expert].double()
    down = experts.down_proj[expert].double()
    value = hidden.double() @ (up if transposed else up.T)
    if experts.has_bias:
        value = value + experts.gate_up_proj_bias[expert].double()
    value = experts._apply_gate(value)
    value = value @ (down if transposed else down.T)
    return value + experts.down_proj_bias[expert].double() if experts.has_bias else value


def _next_is_response(batch: Batch, token: int) -> bool:
    """Whether the token after this one, in its own example, is response."""
    row, place = divmod(token, batch.input_ids.shape[1])
    return any(begin <= place + 1 < end for begin, end in batch.examples[row].spans)


@torch.no_grad()
def naive_statistics(model, batches: list[Batch], num_experts: int, sigmoid: bool):
    """Every statistic by layer, as nested sums, and the coalitions.

    ``NAME_size`` says how large the terms of a statistic are, whose signs differ: rounding is relative to that.
    """
    totals: dict[int, dict[str, np.ndarray]] = {}
    coalitions: dict[int, Counter] = {}
    for batch in batches:
        for layer, captured in capture(model, batch).items():
            experts = moe_block(model.model.layers[layer]).experts
            scale = getattr(model.model.layers[layer], "residual_multiplier", 1.0)
            if layer not in totals:
                shapes = {
                    "layer": (4, FOLDS),
                    "expert": (4, FOLDS, num_experts),
                    "pair": (4, 2, num_experts, num_experts),
                }
                names = {
                    "layer": ("layer_tokens", "output_square", "residual_square"),
                    "expert": (
                        "tokens",
                        "gate",
                        "gate_renormalised",
                        "norm",
                        "gated_norm",
                        "gated_norm_renormalised",
                        "gated_norm_turned",
                        "contribution",
                        "contribution_relative",
                        "contribution_size",
                        "contribution_relative_size",
                        "largest_norm",
                        "router_probability",
                    ),
                    "pair": ("gram_relative",),
                }
                totals[layer] = {name: np.zeros(shapes[axes]) for axes, group in names.items() for name in group}
                coalitions[layer] = Counter()
            sums = totals[layer]
            for token in range(len(captured.ids)):
                segment, fold = int(batch.segments[token]), int(batch.folds[token])
                if segment == PADDING:
                    continue
                cell = 2 * segment + int(_next_is_response(batch, token))
                h = captured.residual[token].double()
                ids = captured.ids[token].tolist()
                g = captured.gates[token].double()
                outputs = [expert_output(experts, i, captured.hidden[token]) for i in ids]
                a = [scale * weight * output for weight, output in zip(g, outputs, strict=True)]
                y = sum(a)
                cosine = torch.dot(h, h + y) / (h.norm() * (h + y).norm())
                turned = float(1 - cosine)
                at = (cell, fold)
                sums["layer_tokens"][at] += 1
                sums["output_square"][at] += float(y @ y)
                sums["residual_square"][at] += float(h @ h)
                logits = captured.logits[token].double()
                sums["router_probability"][at] += (logits.sigmoid() if sigmoid else logits.softmax(-1)).numpy()
                coalitions[layer][(tuple(sorted(ids)), cell, fold % 2)] += 1
                for slot, i in enumerate(ids):
                    norm, weight = float(outputs[slot].norm()), float(g[slot])
                    share = weight / float(g.sum())
                    where = (cell, fold, i)
                    along, size = float(a[slot] @ y), float(a[slot].norm() * y.norm())
                    sums["contribution"][where] += along
                    sums["contribution_relative"][where] += along / float(h @ h)
                    sums["contribution_size"][where] += size
                    sums["contribution_relative_size"][where] += size / float(h @ h)
                    sums["tokens"][where] += 1
                    sums["gate"][where] += weight
                    sums["gate_renormalised"][where] += share
                    sums["norm"][where] += norm
                    sums["gated_norm"][where] += weight * norm
                    sums["gated_norm_renormalised"][where] += share * norm
                    sums["gated_norm_turned"][where] += weight * norm * turned
                    sums["largest_norm"][where] = max(sums["largest_norm"][where], norm)
                    for other, j in enumerate(ids):
                        product = float(a[slot] @ a[other])
                        sums["gram_relative"][cell, fold % 2, i, j] += product / float(h @ h)
    return totals, coalitions
