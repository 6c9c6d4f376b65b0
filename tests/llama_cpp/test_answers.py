"""Pruned GGUF files in llama.cpp itself: they answer as the masked original does in Transformers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from shape_moe.architectures.gguf_model import GgufModel
from shape_moe.architectures.gguf_tokenizer import SPLITS
from shape_moe.architectures.loading import load_tokenizer
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.progress import SILENT
from shape_moe.pruning.masks import masked
from shape_moe.pruning.writers import writer_for
from shape_moe.selection.selection import Selection
from support.gguf_files import (
    ARCHITECTURE,
    gguf_model,
    matrices,
    metadata_of,
    random_blocks,
    save_gguf,
    to_gguf,
    write_gguf,
)
from support.selections import random_selection
from support.tiny_models import random_tokens

PYTHON = os.environ.get("SHAPE_MOE_LLAMA_CPP")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs llama.cpp: make test-gguf")
LENGTHS = (1, 5, 23)
VOCABULARY = 128


def prompts() -> list[list[int]]:
    rows = random_tokens(2, max(LENGTHS)).tolist()
    return [row[:length] for row in rows for length in LENGTHS]


def llama_cpp(
    file: Path, given: Sequence[list[int] | str] | None = None, vocabulary: int = VOCABULARY, sampled: int = 10
) -> np.ndarray:
    """Log-probabilities of the next token after every prompt."""
    asked = {"model": str(file), "prompts": given or prompts(), "vocabulary": vocabulary, "sampled": sampled}
    script = Path(__file__).with_name("ask.py")
    done = subprocess.run(
        [str(PYTHON), str(script)], input=json.dumps(asked), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.asarray(json.loads(done.stdout[done.stdout.index("[[") :]))


def transformers_answers(model: torch.nn.Module) -> np.ndarray:
    rows = []
    for prompt in prompts():
        with torch.no_grad():
            rows.append(model(input_ids=torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1).numpy())
    return np.stack(rows)


def pruned(file: Path, folder: Path) -> tuple[Path, Selection]:
    model = open_snapshot(file)
    assert isinstance(model, GgufModel)
    selection = random_selection(model, "reroute", "equal")
    folder.mkdir()
    return writer_for(model, "stock").write(model, selection, folder, SILENT).path, selection


@pytest.mark.parametrize("family", ARCHITECTURE)
def test_float32_answers_as_the_masked_original(family: str, tmp_path: Path) -> None:
    live = gguf_model(family)
    file = save_gguf(live, tmp_path / "m.gguf")
    assert np.abs(llama_cpp(file) - transformers_answers(live)).max() < 1e-3
    smaller, selection = pruned(file, tmp_path / "out")
    with masked(live, selection):
        expected = transformers_answers(live)
    assert np.abs(llama_cpp(smaller) - expected).max() < 1e-3
    assert np.abs(expected - transformers_answers(live)).max() > 0.1


def assembled(original: Path, selection: Selection, file: Path, metadata: dict) -> Path:
    """A new file of the kept experts' blocks, put together by the ``gguf`` package."""
    tensors, types = {}, {}
    for tensor in gguf.GGUFReader(original).tensors:
        rows: slice | Sequence[int] = slice(None)
        if "_exps" in tensor.name or ".ffn_gate_inp." in tensor.name:
            rows = list(selection.layers[int(tensor.name.split(".")[1])])
        tensors[tensor.name] = np.ascontiguousarray(tensor.data[rows])
        if tensor.tensor_type != GGMLQuantizationType.F32:
            types[tensor.name] = tensor.tensor_type
    kept = {**metadata, "expert_count": selection.equal_count}
    return write_gguf(file, ARCHITECTURE[original.parent.name], kept, tensors, raw_types=types)


QUANTISED = ("qwen3_moe", "olmoe", "mixtral")


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K])
@pytest.mark.parametrize("family", QUANTISED)
def test_quantised_answers_as_a_file_newly_assembled(family: str, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"head_dim": 64, "moe_intermediate_size": 256} if family == "qwen3_moe" else {}
    live = gguf_model(family, **sizes)
    folder = tmp_path / family
    folder.mkdir()
    if kind == GGMLQuantizationType.Q8_0:
        file = save_gguf(live, folder / "m.gguf", matrices(kind))
    else:
        tensors, types = to_gguf(live), {}
        for seed, name in enumerate(name for name in tensors if "_exps" in name):
            tensors[name], types[name] = random_blocks(kind, tensors[name].shape, seed), kind
        file = write_gguf(folder / "m.gguf", ARCHITECTURE[family], metadata_of(live.config), tensors, raw_types=types)
    smaller, selection = pruned(file, tmp_path / "out")
    expected = assembled(file, selection, tmp_path / "new.gguf", metadata_of(live.config))
    answers = llama_cpp(smaller)
    assert np.isfinite(answers).all()
    assert np.array_equal(answers, llama_cpp(expected))
    assert not np.array_equal(answers, llama_cpp(file))


TEXTS = (
    "that the 12345 is x!! and 1, that's\n\n1234  th",
    "at 12th.. \u65e5\u672c that+12",
    " 123 \u00e9t\u00e9 's they're",
)


@pytest.mark.parametrize("way", [*sorted(SPLITS), "qwen2", "gpt-2", "llama-bpe", "gpt-4o", "sentencepiece"])
def test_text_becomes_the_same_tokens(way: str, tmp_path: Path) -> None:
    size = 384
    live = gguf_model("qwen3_moe", vocab_size=size, num_hidden_layers=1)
    kind = {"sentencepiece": True} if way == "sentencepiece" else {"pre": way}
    file = save_gguf(live, tmp_path / "m.gguf", **kind)
    tokenizer = load_tokenizer(file)
    ids = [list(tokenizer(text).input_ids) for text in TEXTS]
    assert all(max(row) < size for row in ids)
    letter = 265 if way == "sentencepiece" else 10
    assert np.array_equal(llama_cpp(file, TEXTS, size, letter), llama_cpp(file, ids, size, letter))
