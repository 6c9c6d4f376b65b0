"""Byte ranges: joined, cut into blocks of any size, and compared to the last byte."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError
from shape_moe.pruning import checkpoint as slicer
from shape_moe.pruning import compare
from shape_moe.pruning.checkpoint import plan_checkpoint, write_shard
from shape_moe.pruning.compare import compare_shard, file_hash
from support.selections import random_selection

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=12)


@given(RANGES)
def test_joined_ranges_hold_the_same_bytes_in_order_without_neighbours(ranges) -> None:
    joined = list(slicer._joined(ranges))
    spread = lambda pieces: [place for start, size in pieces for place in range(start, start + size)]  # noqa: E731
    assert spread(joined) == spread(ranges)
    assert all(size > 0 for _, size in joined)


def test_neighbours_become_one_range() -> None:
    assert list(slicer._joined([(0, 4), (4, 2), (8, 1), (9, 1), (3, 2)])) == [(0, 6), (8, 2), (3, 2)]


@given(st.sets(st.integers(0, 20), min_size=1).map(sorted))
def test_runs_of_ids_are_maximal(ids) -> None:
    runs = list(slicer._runs(ids))
    assert [expert for first, count in runs for expert in range(first, first + count)] == ids
    for (first, count), (following, _) in pairwise(runs):
        assert first + count < following


@pytest.mark.parametrize("in_kernel", [True, False])
def test_blocks_of_any_size_give_the_same_file(checkpoint, tmp_path, monkeypatch, in_kernel) -> None:
    snapshot = open_snapshot(checkpoint("mixtral"))
    (plan,) = plan_checkpoint(snapshot, random_selection(snapshot, "reroute", "ragged"))
    copied: list[int] = []
    (tmp_path / "whole").mkdir()
    expected = write_shard(plan, tmp_path / "whole", copied.append)
    assert sum(copied) == plan.size
    monkeypatch.setattr(slicer, "_BLOCK", 1000)
    monkeypatch.setattr(slicer, "_BUFFER", 700)
    monkeypatch.setattr(compare, "_CHUNK", 300)
    if not in_kernel:
        monkeypatch.delattr(slicer.os, "copy_file_range", raising=False)
    copied.clear()
    (tmp_path / "blocks").mkdir()
    found = write_shard(plan, tmp_path / "blocks", copied.append)
    assert found.read_bytes() == expected.read_bytes()
    assert sum(copied) == plan.size
    assert max(copied) <= (1000 if in_kernel else 700)
    compared: list[int] = []
    assert compare_shard(plan, found, compared.append) == file_hash(expected)
    assert sum(compared) == plan.size
    assert max(compared) <= 300


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte_anywhere_is_found_and_its_tensor_named(checkpoint, tmp_path, place) -> None:
    snapshot = open_snapshot(checkpoint("qwen3_moe"))
    (plan,) = plan_checkpoint(snapshot, random_selection(snapshot, "drop", "ragged"))
    file = write_shard(plan, tmp_path)
    tensor = {"first": plan.tensors[0], "middle": plan.tensors[len(plan.tensors) // 2], "last": plan.tensors[-1]}[place]
    data = bytearray(file.read_bytes())
    before = sum(other.size for other in plan.tensors[: plan.tensors.index(tensor)])
    data[len(data) - plan.size + before + (0 if place == "first" else tensor.size - 1)] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"tensor {tensor.name} differs from the original"):
        compare_shard(plan, file)


def test_a_source_that_became_shorter_is_noticed(checkpoint, tmp_path) -> None:
    from dataclasses import replace

    snapshot = open_snapshot(checkpoint("olmoe"))
    (plan,) = plan_checkpoint(snapshot, random_selection(snapshot, "drop", "ragged"))
    short = tmp_path / "short.safetensors"
    short.write_bytes(plan.source.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="became shorter"):
        write_shard(replace(plan, source=short), tmp_path)
