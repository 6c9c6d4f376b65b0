"""The header reader accepts what the library writes and refuses what is damaged."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from shape_moe.architectures.safetensors_file import make_header, read_header
from shape_moe.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool]


def test_reads_what_the_library_writes(tmp_path) -> None:
    tensors = {f"t{i}": torch.zeros(3, i + 1, dtype=dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    slots, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    assert {name: slot.shape for name, slot in slots.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    data = (tmp_path / "a.safetensors").read_bytes()
    for name, slot in slots.items():
        expected = tensors[name].contiguous().view(torch.uint8).numpy().tobytes() if tensors[name].ndim else None
        if expected is not None:
            assert data[slot.start : slot.start + slot.size] == expected


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_writes_what_the_library_reads(tmp_path_factory, shapes) -> None:
    file = tmp_path_factory.mktemp("headers") / "a.safetensors"
    specs = {f"tensor {i}": ("F32", tuple(shape)) for i, shape in enumerate(shapes)}
    payload = b"".join(bytes(4 * torch.Size(shape).numel()) for _, shape in specs.values())
    header = make_header(specs, {"format": "pt"})
    assert len(header) % 8 == 0
    file.write_bytes(header + payload)
    with safe_open(file, "pt") as tensors:
        assert {name: tuple(tensors.get_tensor(name).shape) for name in tensors.keys()} == {  # noqa: SIM118
            name: shape for name, (_, shape) in specs.items()
        }
    assert {name: slot.shape for name, slot in read_header(file)[0].items()} == {n: s for n, (_, s) in specs.items()}


def raw(header: dict, payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not a complete"),
        (b"\x00\x01", "not a complete"),
        ((10**9).to_bytes(8, "little") + b"{}", "not a complete"),
        (raw({}) + b"x", "truncated or damaged"),
        ((3).to_bytes(8, "little") + b"[1]", "no readable safetensors header"),
        ((3).to_bytes(8, "little") + b"{{{", "safetensors header of .* is not valid JSON"),
        (raw({"a": {"dtype": "F32", "shape": [2]}}), "malformed"),
        (raw({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "unknown dtype"),
        (raw({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)), "does not have the size"),
        (raw({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)), "does not have the size"),
        (
            raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
            "overlaps its neighbour or leaves",
        ),
        (
            raw({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, bytes(8)),
            "overlaps its neighbour",
        ),
        (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)), "truncated or damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, word) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=word):
        read_header(file)


def test_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="none.safetensors is missing"):
        read_header(tmp_path / "none.safetensors")
