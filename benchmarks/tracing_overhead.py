"""Tracing all statistics against the same forward pass without tracing."""

from __future__ import annotations

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.harness import paired, write
from shape_moe.calibration.batches import Batch, make_batch
from shape_moe.calibration.examples import Example
from shape_moe.tracing.transformers_model import ModelTracer

LAYERS, HIDDEN, EXPERTS, WIDTH, TOP_K, TOKENS = 4, 1024, 64, 768, 8, 2048
PAIRS = 9


def random_model(dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    """A decoder of the measured shape with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


def token_batch() -> Batch:
    """Eight rows of random tokens, half prompt and half response."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 1024, (8, TOKENS // 8), generator=generator).tolist()
    return make_batch([Example.answered(i, "", tuple(row), TOKENS // 16) for i, row in enumerate(rows)], range(8), 0)


def overhead(dtype: torch.dtype) -> dict[str, object]:
    """Traced against grouped_mm and against eager."""
    model, batch = random_model(dtype), token_batch()
    tracer = ModelTracer(model)

    def plain() -> None:
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def traced() -> None:
        with tracer.attached():
            tracer.add(batch)

    model.set_experts_implementation("grouped_mm")
    result: dict[str, object] = {"against grouped_mm": paired(traced, plain, PAIRS)}
    model.set_experts_implementation("eager")
    return result | {"against eager": paired(traced, plain, PAIRS)}


def main() -> None:
    """Measure and write."""
    shape = f"{LAYERS} layers, hidden {HIDDEN}, {EXPERTS} experts of width {WIDTH}, top-{TOP_K}, {TOKENS} tokens"
    write(
        "tracing_overhead",
        {"shape": shape, "float32": overhead(torch.float32), "bfloat16": overhead(torch.bfloat16)},
    )


if __name__ == "__main__":
    main()
