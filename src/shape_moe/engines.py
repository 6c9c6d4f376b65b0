"""What can run a model: Transformers in this process, or a vLLM engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shape_moe.errors import UsageError

ENGINES = ("transformers", "vllm")


def check_engine(engine: str, engine_args: Mapping[str, Any]) -> None:
    """Refuse an engine that there is not, and arguments of one that takes none.

    Raises:
        UsageError: for either.
    """
    if engine not in ENGINES:
        raise UsageError(f"There is no engine {engine!r}; there are {' and '.join(ENGINES)}.")
    if engine != "vllm" and engine_args:
        raise UsageError("Engine arguments go with --engine vllm.")
