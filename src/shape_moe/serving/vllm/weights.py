"""Weights on their way into the server: of an original checkpoint only what is kept goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

from shape_moe.architectures.tensor_names import tensor_role
from shape_moe.pruning.kept import Keeping
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
    keeping = Keeping(plan.family, plan.num_layers, plan.layers, plan.cuts_router)
    for name, tensor in weights:
        found = keeping.tensor(name)
        if found is not None:
            new_name, rows = found
            yield new_name, tensor if rows is None else tensor[list(rows)]


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
