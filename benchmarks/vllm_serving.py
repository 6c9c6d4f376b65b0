"""Serving pruned checkpoints with vLLM beside the dense model: allocated memory and throughput. Needs vLLM.

Random experts are alike, so chance would let far more slots fall on pruned experts than a calibrated task does. The
router's rows are therefore scaled such that, of each token's 8 slots, as many survive as on the published Qwen3-30B-A3B
selections for GSM8K: 7.94 at keep 0.8, 7.53 at keep 0.6. What really survived is counted in the workers and reported.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.shapes import SURVIVING_OF_8
from benchmarks.harness import paired, write
from shape_moe.architectures.safetensors_file import make_header
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.selection.selection import Selection

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, VOCABULARY = 3, 128, 8, 2048, 768, 4096
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, PAIRS = 16, 64, 24, 7
ROUTER_DEVIATION = 1.5
"""Of router logits: how sharply tokens choose."""


def kept_sets(rng: np.random.Generator) -> dict[float, dict[int, list[int]]]:
    """Experts that each layer keeps: ragged counts, those at keep 0.6 among those at 0.8."""
    sets: dict[float, dict[int, list[int]]] = {keep: {} for keep in SURVIVING_OF_8}
    for layer, shift in zip(range(LAYERS), (-6, 6, 0), strict=True):
        order = rng.permutation(EXPERTS)
        for keep in SURVIVING_OF_8:
            sets[keep][layer] = sorted(order[: round(keep * EXPERTS) + shift].tolist())
    return sets


def router_scales(kept: dict[float, dict[int, list[int]]], layer: int) -> np.ndarray:
    """Factors on a layer's router rows with which the wanted number of slots survives, found by bisection."""
    rng = np.random.default_rng(layer)
    draws = rng.normal(size=(4000, EXPERTS)) * ROUTER_DEVIATION
    scales = np.ones(EXPERTS)
    outer, inner = (np.isin(np.arange(EXPERTS), kept[keep][layer]) for keep in (0.8, 0.6))

    def survive(mask: np.ndarray) -> float:
        chosen = np.argpartition(-draws * scales, TOP_K, axis=1)[:, :TOP_K]
        return float(mask[chosen].sum(1).mean())

    for _ in range(3):  # the two groups of experts depend on each other a little
        for rows, mask, wanted in ((~outer, outer, SURVIVING_OF_8[0.8]), (outer & ~inner, inner, SURVIVING_OF_8[0.6])):
            low, high = 0.0, 1.0
            for _ in range(20):
                scales[rows] = (low + high) / 2
                low, high = (low, (low + high) / 2) if survive(mask) < wanted else ((low + high) / 2, high)
    return scales


def make_checkpoint(folder: Path, kept: dict[float, dict[int, list[int]]]) -> None:
    """A Qwen3-MoE checkpoint with layers of the shape of Qwen3-30B-A3B's, random weights in bfloat16."""
    folder.mkdir()
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16",
        "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": 6144, "moe_intermediate_size": WIDTH,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "norm_topk_prob": True, "vocab_size": VOCABULARY, "hidden_act": "silu",
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map = {}
    files: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    ]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{at}.input_layernorm.weight": (HIDDEN,), f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.q_norm.weight": (128,), f"{at}.self_attn.k_norm.weight": (128,),
            f"{at}.self_attn.q_proj.weight": (4096, HIDDEN), f"{at}.self_attn.k_proj.weight": (512, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (512, HIDDEN), f"{at}.self_attn.o_proj.weight": (HIDDEN, 4096),
            f"{at}.mlp.gate.weight": (EXPERTS, HIDDEN),
        }  # fmt: skip
        for expert in range(EXPERTS):
            for part, shape in (
                ("gate_proj", (WIDTH, HIDDEN)),
                ("up_proj", (WIDTH, HIDDEN)),
                ("down_proj", (HIDDEN, WIDTH)),
            ):
                shapes[f"{at}.mlp.experts.{expert}.{part}.weight"] = shape
        files.append(shapes)
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        with (folder / name).open("wb") as stream:
            stream.write(make_header({tensor: ("BF16", shape) for tensor, shape in shapes.items()}, {"format": "pt"}))
            for tensor, shape in shapes.items():
                stream.write(_bfloat16(_values(rng, tensor, shape, kept)))
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _values(
    rng: np.random.Generator, tensor: str, shape: tuple[int, ...], kept: dict[float, dict[int, list[int]]]
) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    if tensor.endswith("gate.weight"):
        scales = router_scales(kept, int(tensor.split(".")[2]))
        # a normed token has length sqrt(HIDDEN): rows of this length give logits of the wanted deviation
        values *= np.float32(ROUTER_DEVIATION / 0.02 / np.sqrt(HIDDEN)) * scales[:, None].astype(np.float32)
    return values


def _bfloat16(values: np.ndarray) -> bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


class Engine:
    """A vLLM engine with a fixed workload."""

    def __init__(self, folder: Path, *, eager: bool = False) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            enforce_eager=eager,
            max_model_len=256,
            max_num_seqs=PROMPTS,
            enable_prefix_caching=False,
            worker_extension_cls="benchmarks.vllm_worker.Measuring",
        )
        rng = np.random.default_rng(7)
        self.prompts = [
            {"prompt_token_ids": rng.integers(0, VOCABULARY, PROMPT_TOKENS).tolist()} for _ in range(PROMPTS)
        ]

    def work(self) -> None:
        """Answer all prompts."""
        from vllm import SamplingParams

        wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        self.llm.generate(self.prompts, wanted, use_tqdm=False)

    def expert_bytes(self) -> int:
        """Bytes of expert parameters that the worker has allocated."""
        return self.llm.collective_rpc("expert_bytes")[0]

    def count_slots(self) -> np.ndarray:
        """How often each layer routes to each expert during the workload; the engine must be eager."""
        self.llm.collective_rpc("count_slots", args=(EXPERTS,))
        self.work()
        return np.asarray(self.llm.collective_rpc("slot_counts")[0], dtype=np.float64)

    def close(self) -> None:
        """Stop the engine."""
        self.llm.llm_engine.engine_core.shutdown()


def measure(
    folder: Path, dense: Engine, slots: np.ndarray, keep: float, routing: str, kept: dict[int, list[int]]
) -> dict[str, Any]:
    """One pruned checkpoint beside the dense model."""
    selection = Selection(None, None, "qwen3_moe", "none", "none", routing, EXPERTS, TOP_K, kept, keep)  # type: ignore[arg-type]
    out = folder / f"{routing}-{keep}"
    prune(folder / "dense", out, PruneOptions(check_logits=False), selection=selection)
    engine = Engine(out)
    result = paired(dense.work, engine.work, PAIRS)
    surviving = float(np.mean([TOP_K * slots[layer][ids].sum() / slots[layer].sum() for layer, ids in kept.items()]))
    found = {
        "keep": keep,
        "routing": routing,
        "experts_kept": [len(ids) for ids in kept.values()],
        "surviving_slots_per_token": surviving if routing == "drop" else float(TOP_K),
        "expert_bytes": engine.expert_bytes(),
        "throughput_against_dense": result,
        "tokens_per_second": PROMPTS * NEW_TOKENS / result["second_seconds"],
        "tokens_per_second_dense": PROMPTS * NEW_TOKENS / result["first_seconds"],
    }
    engine.close()
    return found


def main() -> None:
    """Measure and write."""
    kept = kept_sets(np.random.default_rng(3))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_checkpoint(folder / "dense", kept)
        counting = Engine(folder / "dense", eager=True)
        slots = counting.count_slots()
        counting.close()
        dense = Engine(folder / "dense")
        rows = [
            measure(folder, dense, slots, keep, routing, kept[keep])
            for keep in SURVIVING_OF_8
            for routing in ("drop", "reroute")
        ]
        results = {
            "model": f"Qwen3-MoE, {LAYERS} layers of {EXPERTS} experts, top-{TOP_K}, hidden {HIDDEN}, width {WIDTH}, "
            "bfloat16",
            "workload": f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens each",
            "dense_expert_bytes": dense.expert_bytes(),
            "rows": rows,
        }
        dense.close()
    write("vllm_serving", results)


if __name__ == "__main__":
    main()
