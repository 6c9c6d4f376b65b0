"""Weights on their way into the server: of an original checkpoint only what is kept goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from shape_moe.architectures.tensor_names import renumbered, tensor_role
from shape_moe.serving.vllm.plan import ServingPlan, expert_count

Weight = tuple[str, Any]


def kept_weights(weights: Iterable[Weight], plan: ServingPlan) -> Iterator[Weight]:
    """What a pruned checkpoint would hold, from an original one.

    Tensors of dropped experts are passed over, those of kept experts get their new number, packed tensors and (under
    ``reroute``) the router's lose the rows of dropped experts.

    Args:
        weights: names on disk and tensors of the original checkpoint.
        plan: what is kept.

    Yields:
        Names and tensors of the pruned checkpoint.
    """
    new_ids = {layer: {old: new for new, old in enumerate(ids)} for layer, ids in plan.layers.items()}
    for name, tensor in weights:
        role = tensor_role(plan.family, name)
        if role.layer >= plan.num_layers:
            continue  # multi-token-prediction layers: their experts were not traced, so they are not served
        ids = new_ids.get(role.layer)
        if ids is None:
            yield name, tensor
        elif role.role == "expert":
            if role.expert in ids:
                yield renumbered(plan.family, name, ids[role.expert]), tensor
        elif role.role == "packed" or (role.role == "router" and plan.routing == "reroute"):
            yield name, tensor[list(ids)]
        else:
            yield name, tensor


def load_kept(
    load: Callable[[Iterable[Weight]], set[str]], weights: Iterable[Weight], plan: ServingPlan, config: Any
) -> set[str]:
    """Load a pruned model's weights with the stock class's own loader.

    Args:
        load: the stock class's ``load_weights``.
        weights: names and tensors on disk.
        plan: what is kept, and what is on disk.
        config: the model's configuration, from which the loader reads the number of experts.

    Returns:
        The names of the parameters that were loaded.
    """
    if plan.from_original:
        weights = kept_weights(weights, plan)
    if not plan.facts.counts_packed_rows:
        return load(weights)

    def rows(weight: Weight) -> int:
        role = tensor_role(plan.family, weight[0])
        return plan.kept(role.layer) if role.role == "packed" else plan.num_experts

    loaded: set[str] = set()
    for count, group in groupby(weights, key=rows):
        with expert_count(plan, config, count):
            loaded |= load(group)
    return loaded
