"""Headers of GGUF files: read as the ``gguf`` package reads them, and refused in one sentence when damaged."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shape_moe.architectures.gguf_file import make_header, read_gguf
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.errors import CheckpointError, ShapeMoeError
from support.gguf_files import gguf_model, save_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(gguf_model("qwen3_moe"), tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_a_header_is_read_as_the_package_reads_it(file: Path) -> None:
    header, expected = read_gguf(file), gguf.GGUFReader(file)
    assert header.data_start == expected.data_offset
    for tensor in expected.tensors:
        found = header.tensors[tensor.name]
        assert found.type_name == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.start, found.size) == (tensor.data_offset, tensor.n_bytes)
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert list(header.entries) == [key for key in expected.fields if key not in own]
    for key, value in header.metadata.items():
        assert value == expected.fields[key].contents() or value == []


def test_a_header_is_written_back_byte_for_byte(file: Path) -> None:
    header = read_gguf(file)
    tensors = [(t.name, t.type_name, t.shape, t.size) for t in header.tensors.values()]
    again = make_header(list(header.entries.values()), tensors, header.alignment)
    assert again == file.read_bytes()[: header.data_start]


def test_every_shortened_file_is_refused(file: Path, tmp_path: Path) -> None:
    content, cut = file.read_bytes(), tmp_path / "cut.gguf"
    header = read_gguf(file)
    for length in [0, 3, 4, 8, 16, 23, 24, *range(25, header.data_start, 997), header.data_start, len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_gguf(cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_is_refused_or_read(file: Path, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content, damaged = bytearray(file.read_bytes()), tmp_path / "damaged.gguf"
    for position, value in changes:
        content[position] = value
    damaged.write_bytes(content)
    try:
        _ = open_snapshot(damaged).moe_layers
    except ShapeMoeError as error:
        assert str(error).count("\n") == 0
