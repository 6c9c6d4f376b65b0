"""What ``--for`` asks for, and what is said before a model is pruned."""

from __future__ import annotations

import pytest

from shape_moe.errors import UsageError
from shape_moe.serving.engines import ENGINES, target_for, what_loads


@pytest.mark.parametrize(
    ("engine", "family", "target"),
    [
        ("transformers", "qwen3_moe", "ragged"),
        ("transformers", "afmoe", "ragged"),
        ("vllm", "qwen3_moe", "ragged"),
        ("vllm", "afmoe", "stock"),  # the plugin does not know it
        ("mlx", "qwen3_moe", "stock"),
        ("sglang", "qwen3_moe", "stock"),
        ("llama.cpp", "qwen3_moe", "stock"),
    ],
)
def test_every_engine_gets_what_it_loads(engine: str, family: str, target: str) -> None:
    assert target_for(engine, family, gguf=False) == target
    facts = ENGINES[engine]
    assert facts.loads(family, target, gguf=False) == facts.folder


def test_gguf_files_are_for_llama_cpp() -> None:
    assert target_for("llama.cpp", "qwen3_moe", gguf=True) == "stock"
    with pytest.raises(UsageError, match="for vLLM start from the model's folder"):
        target_for("vllm", "qwen3_moe", gguf=True)
    with pytest.raises(UsageError, match="--for takes vllm, llama.cpp, mlx, sglang, transformers, not 'ollama'"):
        target_for("ollama", "qwen3_moe", gguf=False)


def test_what_is_said_names_every_engine_once() -> None:
    assert what_loads("qwen3_moe", "ragged", gguf=False) == (
        "The result will load in vLLM and Transformers, with what comes with this package, but not in llama.cpp, MLX "
        "or SGLang; for one of those, give --for llama.cpp."
    )
    assert what_loads("qwen3_moe", "stock", gguf=False) == (
        "The result will load in vLLM, MLX, SGLang, Transformers and llama.cpp once it is converted, as far as these "
        "know the family."
    )
    assert what_loads("qwen3_moe", "stock", gguf=True) == (
        "The result will load in llama.cpp, as far as it knows the family."
    )
