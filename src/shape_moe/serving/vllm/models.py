"""The classes that vLLM instantiates for pruned models: ``ShapeQwen3MoeForCausalLM`` and its siblings.

vLLM imports them by name; each is the stock class, made when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shape_moe.errors import ServingError
from shape_moe.pruning.modeling_shape_moe import PREFIX
from shape_moe.serving.vllm.building import model_module, pruned_layers
from shape_moe.serving.vllm.families import VLLM_FAMILIES, architectures
from shape_moe.serving.vllm.kernel_configs import reuse_dense_configs
from shape_moe.serving.vllm.plan import read_plan
from shape_moe.serving.vllm.startup import check_startup, check_version
from shape_moe.serving.vllm.weights import Weight, load_kept


def _served_class(name: str, family: str) -> type[Any]:
    stock: type[Any] = getattr(model_module(VLLM_FAMILIES[family].module), name.removeprefix(PREFIX))

    class Served(stock):  # type: ignore[misc]  # a base class known at run time
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            import vllm

            check_version(vllm.__version__)
            config = vllm_config.model_config.hf_config
            plan = read_plan(config)
            check_startup(plan, vllm_config)
            with pruned_layers(plan, config) as built:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            missing = set(plan.layers) - built
            if missing and vllm_config.parallel_config.pipeline_parallel_size == 1:
                raise ServingError(f"The model has no MoE layers {sorted(missing)}, which shape_pruning describes.")
            reuse_dense_configs(plan)
            self.shape_moe_plan = plan

        def load_weights(self, weights: Iterable[Weight]) -> set[str]:
            """Load what is kept."""
            return load_kept(super().load_weights, weights, self.shape_moe_plan, self.config)

    Served.__name__ = Served.__qualname__ = name
    Served.__doc__ = f"vLLM's {stock.__name__} with the experts that ``config.shape_pruning`` keeps."
    return Served


def __getattr__(name: str) -> type[Any]:
    family = architectures().get(name)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _served_class(name, family)
    served: type[Any] = globals()[name]
    return served
