"""Pruned models in vLLM: the plugin, and a selection applied to the original checkpoint while it loads.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in every one of its
processes. Importing this package needs neither vLLM nor torch.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shape_moe.selection.selection import Selection

__all__ = ["overrides", "register"]


def register() -> None:
    """Make the architectures of pruned models known to vLLM; calling it again changes nothing."""
    from shape_moe.serving.vllm.registration import register_architectures

    register_architectures()


def overrides(
    model: str | PathLike[str],
    selection: Selection | str | PathLike[str],
    *,
    revision: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """What ``vllm.LLM(model, hf_overrides=...)`` needs to serve an original checkpoint with a selection applied.

    Args:
        model: a folder or hub id.
        selection: the selection, or its file.
        revision: of a hub model.
        force: accept a selection made from a live model of unknown origin.

    Raises:
        ShapeMoeError: when the selection was made from another model or does not fit it.
    """
    from shape_moe.serving.vllm.serve_time import config_overrides

    return config_overrides(model, selection, revision=revision, force=force)
