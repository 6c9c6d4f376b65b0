"""Imatrices of llama.cpp as a user types it: from one to a pruned model that has its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import UsageError
from shape_moe.interop.imatrix import read_imatrix
from shape_moe.jobs.convert import convert
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.select import select
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.trace import load_trace
from support.cli import refused
from support.gguf_files import gguf_model, save_gguf
from support.imatrix import collect, pack_gguf, pack_legacy
from support.selections import random_selection

STOCK = Method("imatrix-energy", "uniform", "reroute", "stock")


@pytest.fixture(scope="module")
def live():
    return gguf_model("qwen3_moe")


@pytest.fixture(scope="module")
def file(live, tmp_path_factory) -> Path:
    return save_gguf(live, tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(scope="module")
def collected(live):
    """Of so few tokens that some experts are never used."""
    draw = torch.Generator().manual_seed(0)
    return collect(live, [torch.randint(0, live.config.vocab_size, (12,), generator=draw) for _ in range(2)])


@pytest.fixture(params=["gguf", "legacy"])
def imatrix(request, collected, tmp_path) -> Path:
    pack, name = (pack_gguf, "imatrix.gguf") if request.param == "gguf" else (pack_legacy, "imatrix.dat")
    return pack(collected, tmp_path / name)


def test_from_an_imatrix_to_a_pruned_file_with_its_imatrix(file, imatrix, collected, tmp_path, call) -> None:
    code, _, said = call("convert", imatrix, "--model", file, "-o", tmp_path / "t")
    assert code == 0
    assert "general text, not your task" in said
    assert "wiki.train.raw" in said
    code, _, said = call(
        *("prune", file, "--trace", tmp_path / "t", "--keep", "0.5", "--method", str(STOCK), "--imatrix", imatrix),
        *("--no-judge", "--no-logits", "-o", tmp_path / "small.gguf"),
    )
    assert code == 0, said
    assert "general text, not your task" in said
    selection = json.loads((tmp_path / "small.shape" / "shape" / "selection.json").read_text())
    own = read_imatrix(tmp_path / "small.shape" / imatrix.name)
    whole = read_imatrix(imatrix)
    for name, entry in own.entries.items():
        kept = selection["layers"][name.split(".")[1]]
        rows = whole.entries[name].sums.reshape(16, -1)[kept]
        np.testing.assert_array_equal(entry.sums.reshape(8, -1), rows)
        counts = whole.entries[name].counts
        np.testing.assert_array_equal(entry.counts, counts[kept] if len(counts) > 1 else counts)
    assert own.entries.keys() == collected.keys()
    assert (own.datasets, own.chunks, own.chunk_size) == (whole.datasets, whole.chunks, whole.chunk_size)
    again = convert(tmp_path / "small.shape" / imatrix.name, tmp_path / "t2", model=tmp_path / "small.gguf")
    before = load_trace(tmp_path / "t").sums("imatrix_energy")
    for row, ids in enumerate(selection["layers"].values()):
        np.testing.assert_array_equal(again.sums("imatrix_energy")[row], before[row, ids])
    assert call("report", tmp_path / "small.gguf", "-o", tmp_path / "report.html")[0] == 0


def test_what_an_imatrix_cannot_say_is_refused(file, imatrix, tmp_path, call) -> None:
    convert(imatrix, tmp_path / "t", model=file)
    for scorer, why in (("shape", "which of them serve a token together"), ("reap", "a trace made by llama.cpp's")):
        with pytest.raises(UsageError, match=why):
            select(tmp_path / "t", SelectOptions(0.5, Method(scorer)))
    refused(call("convert", imatrix, "-o", tmp_path / "x"), 2, "name it with --model")
    options = PruneOptions(imatrix=imatrix, judgement=None, check_logits=False)
    ragged = random_selection(open_snapshot(file), "drop", "ragged")
    with pytest.raises(UsageError, match="target stock"):
        prune(file, tmp_path / "x.gguf", options, selection=ragged)
