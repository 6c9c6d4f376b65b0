"""Names and layouts on disk that Transformers converts while loading: pruned models load as their originals do."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import WeightRenaming

from shape_moe.architectures.families import FAMILIES, Family
from shape_moe.architectures.loading import load_model
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.pruning.masks import masked
from support.selections import random_selection
from support.tiny_models import COMMON, random_tokens

RENAMED = {
    "model.embed_tokens.": "model.word_embeddings.",
    "lm_head.": "output_layer.",
    ".self_attn.": ".attention.",
}
"""Names in the model and on disk: of parts inside the base model, and of one beside it."""

_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_HYBRID = {
    **COMMON,
    **_MLA,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
REAL = {
    "bailing_hybrid": (
        Family(
            "bailing_hybrid",
            "BailingHybridForCausalLM",
            count_keys=_COUNTS,
            top_k_keys=("num_experts_per_token", "num_experts_per_tok"),
            router_rows=("gate.weight", "gate.expert_bias"),
            router_scores="sigmoid",
        ),
        {
            **_HYBRID,
            "num_local_experts": 8,
            "head_dim": 8,
            "layer_group_size": 3,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "hy_v4": (
        Family(
            "hy_v4",
            "HYV4ForCausalLM",
            count_keys=_COUNTS,
            router_rows=("gate.weight", "gate.e_score_correction_bias"),
            router_scores="sigmoid",
        ),
        {
            **_HYBRID,
            "n_routed_experts": 8,
            "index_topk": 64,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "hc_mult": 2,
        },
    ),
}


def renamings() -> list[WeightRenaming]:
    return [
        WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"^output_layer\.", "lm_head."),
        WeightRenaming(r"\.attention\.", ".self_attn."),
    ]


def renamed_on_disk(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for live, disk in RENAMED.items():
            name = name.replace(live, disk)  # noqa: PLW2901
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(2, 16)).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def check_all_ways(source: Path, folder: Path, routing: str, prelude: str) -> None:
    """With the package, with the bundled file alone, and saved and loaded again: the masked original each time."""
    out, again = folder / "out", folder / "again"
    selection = random_selection(open_snapshot(source), routing, "ragged")
    original = load_model(open_snapshot(source), device="cpu")
    plain = logits_of(original)
    with masked(original, selection):
        expected = logits_of(original)
    assert not close(plain, expected), "the selection must matter"
    result = prune(source, out, PruneOptions(device="cpu"), selection=selection)
    assert result.logits is not None
    assert result.logits.passed
    pruned = AutoModelForCausalLM.from_pretrained(out).eval()
    name = f"Shape{type(original).__name__}"
    assert type(pruned).__name__ == name
    assert close(logits_of(pruned), expected)
    pruned.save_pretrained(again)
    old, new = (load_file(where / "model.safetensors") for where in (out, again))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert close(logits_of(AutoModelForCausalLM.from_pretrained(again).eval()), expected)
    torch.save((random_tokens(2, 16), expected), folder / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(prelude=prelude), folder / "expected.pt", out, again],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name, "True", name, "True"]


_WITHOUT = """
import sys
sys.modules["shape_moe"] = None
{prelude}
import torch
from transformers import AutoModelForCausalLM
tokens, expected = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        error = (model(input_ids=tokens).logits - expected).abs().max()
    print(type(model).__name__, bool(error <= 2e-5 * expected.abs().max()))
"""


_PRELUDE = """
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming
conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
known = conversion_mapping._checkpoint_conversion_mapping_cache
known[{key!r}] = [
    *known["qwen3_moe"],
    WeightRenaming(r"^model\\.word_embeddings\\.", "model.embed_tokens."),
    WeightRenaming(r"^output_layer\\.", "lm_head."),
    WeightRenaming(r"\\.attention\\.", ".self_attn."),
]
"""


@pytest.mark.parametrize(("key", "routing"), [("qwen3_moe", "drop"), ("Qwen3MoeForCausalLM", "reroute")])
def test_conversions_of_a_model_type_and_of_a_class(checkpoint, tmp_path, monkeypatch, key, routing) -> None:
    """Conversions at the root of the model, known to Transformers by the model type or by the stock class's name."""
    source = renamed_on_disk(checkpoint("qwen3_moe"), tmp_path / "model")
    conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    known = copy.deepcopy(conversion_mapping._checkpoint_conversion_mapping_cache)
    known[key] = [*known["qwen3_moe"], *renamings()]
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", known)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    check_all_ways(source, tmp_path, routing, _PRELUDE.format(key=key))


@pytest.mark.parametrize(("name", "routing"), [("bailing_hybrid", "reroute"), ("hy_v4", "drop")])
def test_families_with_conversions_at_the_root(tmp_path, monkeypatch, name, routing) -> None:
    facts, entries = REAL[name]
    monkeypatch.setitem(FAMILIES, name, facts)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **entries)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in key:
                tensor.uniform_(-0.2, 0.2)
            elif ".gate." in key:
                tensor.normal_(std=0.5)
            elif tensor.ndim >= 2:
                tensor.normal_(std=0.2)
    model.save_pretrained(tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert not names <= set(model.state_dict()), "the names on disk must differ from those in the model"
    check_all_ways(tmp_path / "model", tmp_path, routing, "")
