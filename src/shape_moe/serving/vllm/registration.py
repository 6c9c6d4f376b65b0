"""The plugin's entry: architectures of pruned models in vLLM's registries."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from shape_moe.errors import ServingError
from shape_moe.literal_paths import check_plain
from shape_moe.pruning.modeling_shape_moe import PREFIX
from shape_moe.serving.vllm.families import architectures
from shape_moe.serving.vllm.plan import read_plan
from shape_moe.serving.vllm.startup import check_startup, check_version

_CLASSES = "shape_moe.serving.vllm.models"


def register_architectures() -> None:
    """Register every architecture by name, and the checks that run before a server starts."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    for name in architectures():
        ModelRegistry.register_model(name, f"{_CLASSES}:{name}")
        # vLLM adjusts some models by architecture, so the pruned name needs the stock name's adjustments too.
        stock = MODELS_CONFIG_MAP.get(name.removeprefix(PREFIX), VerifyAndUpdateConfig)
        MODELS_CONFIG_MAP[name] = _checked(stock)
    if not getattr(sys.excepthook, "shape_moe", False):
        sys.excepthook = _one_sentence(sys.excepthook)


def _checked(stock: type[Any]) -> type[Any]:
    class Checked(stock):  # type: ignore[misc]  # a base class known at run time
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            import vllm

            check_version(vllm.__version__)
            check_plain(vllm_config.model_config.model, "vLLM")
            check_startup(read_plan(vllm_config.model_config.hf_config), vllm_config)
            stock.verify_and_update_config(vllm_config)

    return Checked


def _one_sentence(hook: Any) -> Any:
    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, ServingError):
            sys.stderr.write(f"Error: {error}\n")
        else:
            hook(kind, error, trace)

    show.shape_moe = True  # type: ignore[attr-defined]  # a mark on the function
    return show
