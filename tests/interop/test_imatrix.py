"""Imatrices of llama.cpp: read in both formats, made a trace of, scored by, and sliced along with the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shape_moe.errors import DataError, UsageError
from shape_moe.interop.imatrix import read_imatrix, sliced
from shape_moe.jobs.convert import convert
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.prune_series import prune_series
from shape_moe.jobs.select import score
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions
from shape_moe.tracing.trace import load_trace
from support.gguf_files import gguf_model, save_gguf
from support.imatrix import collect, pack_gguf, pack_legacy
from support.tiny_models import save_model

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


def energies(live, collected, *, means: bool = False) -> np.ndarray:
    """``sum_c |D_c|^2 sum_t u_tc^2`` word by word; the same per token."""
    rows = []
    for number, layer in enumerate(live.model.layers):
        sums, counts = collected[f"blk.{number}.ffn_down_exps.weight"]
        down = layer.mlp.experts.down_proj.detach().double().numpy()
        row = [sum((d[:, c] ** 2).sum() * s[c] for c in range(len(s))) for d, s in zip(down, sums, strict=True)]
        rows.append(np.array(row) / np.maximum(counts, 1) if means else row)
    return np.array(rows)


def test_counts_and_energies_are_those_of_the_text(live, file, collected, tmp_path) -> None:
    found = convert(pack_gguf(collected, tmp_path / "i.gguf"), tmp_path / "t", model=file)
    counts = np.array([collected[f"blk.{n}.ffn_down_exps.weight"][1] for n in found.info.layers])
    assert (counts == 0).any()
    np.testing.assert_array_equal(found.sums("tokens"), counts)
    np.testing.assert_array_equal(score(tmp_path / "t", "frequency").values, counts)
    np.testing.assert_allclose(score(tmp_path / "t", "imatrix-energy").values, energies(live, collected), rtol=1e-5)
    assert found.info.tokens == {"prompt": 0.0, "response": 24.0}
    assert found.info.source["texts"] == ["wiki.train.raw"]
    assert load_trace(tmp_path / "t").info == found.info


def test_the_older_format_compares_tokens_by_their_mean(live, file, collected, tmp_path) -> None:
    found = convert(pack_legacy(collected, tmp_path / "imatrix.dat", calls=3), tmp_path / "t", model=file)
    counts = np.array([collected[f"blk.{n}.ffn_down_exps.weight"][1] for n in found.info.layers])
    np.testing.assert_array_equal(found.sums("tokens"), np.where(counts > 0, 3.0, 0.0))
    expected = 3 * energies(live, collected, means=True) * (counts > 0)
    np.testing.assert_allclose(score(found, "imatrix-energy").values, expected, rtol=1e-5)
    assert any("keeps means and no tokens per expert" in remark for remark in found.remarks)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_columns_are_those_of_the_down_projection_however_it_is_stored(family, tmp_path) -> None:
    """One inner column of one expert at a time: the output's energy is that column's, whatever the rest."""
    live = gguf_model(family)
    experts = live.model.layers[1].mlp.experts
    down = experts.down_proj.detach().double()
    down = down.transpose(1, 2) if family == "gpt_oss" else down
    count, hidden, inner = down.shape
    assert hidden == live.config.hidden_size
    sums = np.zeros((count, inner))
    sums[np.arange(count), np.arange(count) % inner] = 1
    layers = {n: (sums, np.ones(count)) for n, layer in enumerate(live.model.layers) if hasattr(layer.mlp, "experts")}
    packed = pack_gguf({f"blk.{n}.ffn_down_exps.weight": of for n, of in layers.items()}, tmp_path / "i.gguf")
    expected = [float(down[e, :, e % inner].square().sum()) for e in range(count)]
    for model in (save_model(live, tmp_path / "model"), save_gguf(live, tmp_path / "m.gguf")):
        found = score(convert(packed, tmp_path / f"of-{model.name}", model=model), "imatrix-energy")
        np.testing.assert_allclose(found.values[list(layers).index(1)], expected, rtol=1e-5)


def test_every_model_of_a_series_has_its_imatrix(file, imatrix, tmp_path) -> None:
    convert(imatrix, tmp_path / "t", model=file)
    options = PruneOptions(SelectOptions(1.0, STOCK), imatrix=imatrix, judgement=None, check_logits=False)
    result = prune_series(file, tmp_path / "small", (0.75, 0.5), options, trace=tmp_path / "t")
    whole = read_imatrix(imatrix)
    for keep, model in zip((0.75, 0.5), result.models, strict=True):
        own = read_imatrix(tmp_path / "small" / f"small-{keep}.shape" / imatrix.name)
        expected = sliced(whole, model.selection, 3)
        assert all((own.entries[name].sums == entry.sums).all() for name, entry in expected.entries.items())


def test_foreign_and_damaged_files_are_refused(file, imatrix, tmp_path) -> None:
    other = save_gguf(gguf_model("qwen3_moe", num_experts=32), tmp_path / "other.gguf")
    with pytest.raises(DataError, match="another model"):
        convert(imatrix, tmp_path / "t", model=other)
    wide = save_gguf(gguf_model("qwen3_moe", moe_intermediate_size=48), tmp_path / "wide.gguf")
    with pytest.raises(DataError, match="another model: its experts of layer 0 have 24 inner columns"):
        convert(imatrix, tmp_path / "t", model=wide)
    whole = imatrix.read_bytes()
    for length in (len(whole) // 2, len(whole) // 4):
        imatrix.write_bytes(whole[:length])
        with pytest.raises((DataError, UsageError)):
            convert(imatrix, tmp_path / "t", model=file, kind="imatrix")
    with pytest.raises(DataError, match="no imatrix"):
        (tmp_path / "text.dat").write_text("hello, this is a text")
        convert(tmp_path / "text.dat", tmp_path / "t", model=file, kind="imatrix")
    assert not (tmp_path / "t").exists()
