"""Pruned checkpoints through Transformers' auto classes, without importing Transformers until somebody else does.

``import shape_moe`` installs a hook that waits for Transformers' auto classes. From then on a configuration with
``shape_pruning`` resolves to the class of pruned models; every other configuration resolves as ever. (The public
``AutoModelForCausalLM.register`` would not do: it has one class per configuration class, and pruned and stock models
share theirs.)
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from shape_moe.architectures.moe_config import PRUNING_KEY

_AUTO_MODULE = "transformers.models.auto.auto_factory"
_RESOLVER = "_get_model_class"
_LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration")


def register(auto_module: ModuleType) -> None:
    """Teach Transformers' auto classes to resolve configurations of pruned checkpoints; once is enough."""
    resolve = getattr(auto_module, _RESOLVER)
    if getattr(resolve, "knows_pruned", False):
        return

    def resolve_pruned(config: Any, mapping: Mapping[Any, Any]) -> Any:
        model_class = resolve(config, mapping)
        if getattr(config, PRUNING_KEY, None) is None or not model_class.__name__.endswith(_LANGUAGE_MODELS):
            return model_class
        from shape_moe.pruning.modeling_shape_moe import pruned_class

        return pruned_class(model_class)

    resolve_pruned.knows_pruned = True  # type: ignore[attr-defined]  # a mark on the function
    setattr(auto_module, _RESOLVER, resolve_pruned)


def install() -> None:
    """Register now if the auto classes are imported already, else as soon as they are."""
    module = sys.modules.get(_AUTO_MODULE)
    if module is not None and hasattr(module, _RESOLVER):
        register(module)
    elif not any(isinstance(finder, _AutoModuleWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModuleWatcher())


class _AutoModuleWatcher(MetaPathFinder):
    """Finds nothing itself; lets the other finders find the auto classes, and registers once they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(module)
