"""A model's weights by layer and expert, as inspection, fingerprints, pruning and comparison read them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.architectures.weight_source import WeightSource
from support.fp8 import save_fp8_model
from support.mxfp4 import save_mxfp4_model


def test_every_expert_has_its_bytes_and_values(family, checkpoint) -> None:
    source: WeightSource = open_snapshot(checkpoint(family))
    tensors = load_file(checkpoint(family) / "model.safetensors")
    moe, seen = source.moe, 0
    for layer in source.moe_layers:
        whole = {slot.name for slot in source.layer(layer)}
        assert whole == {name for name in tensors if f".layers.{layer}." in name}
        for expert in range(moe.num_experts):
            parts = source.expert(layer, expert)
            for part in parts:
                tensor = tensors[part.name]
                packed = part.shape != tuple(tensor.shape)
                expected = tensor[expert] if packed else tensor
                assert packed or f".experts.{expert}." in part.name
                assert part.size == len(part.read()) == expected.numel() * expected.element_size()
                assert torch.equal(source.values(part), expected)
            for part in source.plain_expert(layer, expert):
                tensor, found = tensors[part.name], part.values()
                assert torch.equal(found, tensor if found.shape == tensor.shape else tensor[expert])
                assert part.count == found.numel()
            seen += sum(part.size for part in parts)
    assert seen == measure(source).experts
    assert source.forms == {"raw", "dequantised"}
    assert set(source.plain) == set(tensors)


@pytest.mark.parametrize("save", [save_mxfp4_model, save_fp8_model])
def test_quantised_values_are_given_as_they_are_stored(tmp_path, save) -> None:
    source: WeightSource = open_snapshot(save(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    layer = source.moe_layers[0]
    for part in source.expert(layer, 3):
        found, whole = source.values(part), tensors[part.name]
        expected = whole[3] if part.shape != tuple(whole.shape) else whole
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))
