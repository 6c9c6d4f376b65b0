"""What quantised weights stand for: every method's layout, against checkpoints that were packed number by number."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from shape_moe.architectures.loading import load_model, loaded_bytes
from shape_moe.architectures.quantised.bits import unpacked
from shape_moe.architectures.quantised.method import find_quantisation
from shape_moe.architectures.safetensors_file import read_header
from shape_moe.architectures.sizes import measure
from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.architectures.weight_source import WeightSource
from shape_moe.errors import CheckpointError, ShapeMoeError, UnsupportedModelError
from support.fp8 import save_fp8_model
from support.mxfp4 import save_mxfp4_model
from support.quantised import METHODS, SIZES, save_quantised, words_of
from support.tiny_models import make_model


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A checkpoint of each method and the plain weights that it stands for, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("quantised") / name
            made[name] = (folder, save_quantised(folder, name))
        return made[name]

    return get


@pytest.mark.parametrize("name", METHODS)
def test_plain_tensors_are_what_was_packed(quantised, name) -> None:
    folder, plain = quantised(name)
    source: WeightSource = open_snapshot(folder)
    assert source.forms == {"raw", "dequantised"}
    assert set(source.plain) == set(plain)
    for key, tensor in source.plain.items():
        assert torch.equal(tensor.values(), plain[key]), key
        assert tensor.count == plain[key].numel()
    whole = make_model("qwen3_moe", **SIZES)
    assert loaded_bytes(open_snapshot(folder), "float32") == 4 * sum(p.numel() for p in whole.parameters())
    experts = sum(tensor.numel() for key, tensor in plain.items() if ".experts." in key)
    assert measure(source).expert_values == experts


@pytest.mark.parametrize("name", METHODS)
def test_layers_and_experts(quantised, name) -> None:
    folder, plain = quantised(name)
    source: WeightSource = open_snapshot(folder)
    for layer in source.moe_layers:
        assert {t.name for t in source.plain_layer(layer)} == {key for key in plain if f".layers.{layer}." in key}
        for expert in range(source.moe.num_experts):
            of_it = {t.name for t in source.plain_expert(layer, expert)}
            assert of_it == {key for key in plain if f".layers.{layer}.mlp.experts.{expert}." in key}


@pytest.mark.parametrize("name", METHODS)
def test_transformers_loads_the_plain_model(quantised, name) -> None:
    folder, plain = quantised(name)
    notes = []
    model = load_model(open_snapshot(folder), device="cpu", dtype="float32", note=notes.append)
    expected = make_model("qwen3_moe", **SIZES)
    expected.load_state_dict(live(plain))
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in model.state_dict().items())
    label = open_snapshot(folder).quantisation.label
    assert notes == [f"{label}: dequantised to float32 to be run here."]
    assert not hasattr(model.config, "quantization_config")


def live(plain):
    """A checkpoint's tensors as the live model has them."""
    result = {key: tensor for key, tensor in plain.items() if ".experts." not in key}
    for layer in {key.split(".")[2] for key in plain if ".experts." in key}:
        block = f"model.layers.{layer}.mlp.experts"

        def stack(projection, block=block):
            return torch.stack([plain[f"{block}.{e}.{projection}.weight"] for e in range(SIZES["num_experts"])])

        result[f"{block}.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], 1)
        result[f"{block}.down_proj"] = stack("down_proj")
    return result


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source: WeightSource = open_snapshot(save_mxfp4_model(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for layer in source.moe_layers:
        for projection in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{layer}.mlp.experts.{projection}"
            expected = convert_moe_packed_tensors(tensors[f"{key}_blocks"], tensors[f"{key}_scales"])
            assert torch.equal(source.plain[key].values(), expected.float())
            by_name = {t.name: t for t in source.plain_expert(layer, 3)}
            assert torch.equal(by_name[key].values(), expected[3].float())
            assert by_name[key].count == expected[3].numel()


def test_fp8_is_what_transformers_makes_of_it(tmp_path) -> None:
    import transformers

    folder = save_fp8_model(tmp_path / "model")
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    model = load_model(open_snapshot(folder), device="cpu")
    assert model.dtype == torch.bfloat16
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_is_what_its_library_makes_of_it(tmp_path, kind, nested) -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    stored, state = library.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    parts = {f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file({"w": stored, **parts}, tmp_path / "model.safetensors")
    (tensor,) = find_quantisation({"quantization_config": {"quant_method": "bitsandbytes"}}).plain(
        read_header(tmp_path / "model.safetensors")[0]
    )
    assert torch.equal(tensor.values().to(torch.bfloat16), library.dequantize_4bit(stored, state))


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_in_streams_of_bits(bits) -> None:
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 2**bits, (3, 64), generator=generator)
    words = torch.tensor([words_of(row.tolist(), bits) for row in numbers], dtype=torch.int32)
    assert torch.equal(unpacked(words, bits), numbers.to(torch.int32))


def test_an_order_of_activation_of_compressed_tensors(quantised, tmp_path) -> None:
    folder, plain = quantised("compressed_int4")
    folder = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.experts.1.up_proj"
    order = torch.arange(32).reshape(4, 8).T.flatten() // 8
    tensors[f"{key}.weight_g_idx"] = order.to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    scales = tensors[f"{key}.weight_scale"].float()
    numbers = plain[f"{key}.weight"] / scales.repeat_interleave(8, 1)
    found = open_snapshot(folder).plain[f"{key}.weight"].values()
    torch.testing.assert_close(found, numbers.round() * scales[:, order], rtol=1e-6, atol=0)


def changed(folder, settings, tmp_path, edit=lambda tensors: None):
    """A copy of a checkpoint with other settings or tensors."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), **settings}
    (copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors")
    return open_snapshot(copy)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("awq", {"version": "gemv"}, "AWQ 4-bit, groups of 8 of version 'gemv'"),
        ("awq", {"bits": 3}, "AWQ 3-bit, groups of 8 has another width"),
        ("gptq", {"checkpoint_format": "marlin"}, "GPTQ 4-bit, groups of 8 in the checkpoint format 'marlin'"),
        ("gptq", {"bits": 5}, "GPTQ 5-bit, groups of 8 has another width"),
        ("compressed_int8", {"config_groups": {}}, "compressed-tensors without a table config_groups"),
        ("compressed_int4", {"format": "marlin-24"}, "compressed-tensors int4 (marlin-24) in the format 'marlin-24'"),
        ("gptq", {"pack_dtype": "int16"}, "GPTQ 4-bit, groups of 8 packed into int16"),
        ("modelopt_fp8", {"quant_algo": "W4A8_AWQ"}, "modelopt W4A8_AWQ is not understood; FP8 and NVFP4 are"),
        ("gptq", {"quant_method": "hqq"}, "hqq is not known here; known are awq, bitsandbytes, "),
    ],
)
def test_what_cannot_be_dequantised_is_refused_by_its_name(quantised, tmp_path, name, settings, said) -> None:
    source = changed(quantised(name)[0], settings, tmp_path)
    assert source.forms == {"raw"}
    with pytest.raises(UnsupportedModelError) as error:
        _ = source.plain
    assert said in str(error.value)
    assert measure(source).total == source.total_bytes  # what is stored can be looked at all the same


@pytest.mark.parametrize(
    ("name", "file", "settings"),
    [
        ("gptq_3", "quantize_config.json", {"bits": 3, "group_size": 8, "desc_act": True, "sym": False}),
        ("awq", "quant_config.json", {"zero_point": True, "q_group_size": 8, "w_bit": 4, "version": "GEMM"}),
        ("modelopt_nvfp4", "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}),
    ],
)
def test_settings_in_a_file_of_their_own(quantised, tmp_path, name, file, settings) -> None:
    folder, plain = quantised(name)
    folder = shutil.copytree(folder, tmp_path / "model")
    label = open_snapshot(folder).quantisation.label
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_snapshot(folder).quantisation is None
    (folder / file).write_text(json.dumps(settings))
    source = open_snapshot(folder)
    assert source.quantisation.label == label
    assert all(torch.equal(tensor.values(), plain[key]) for key, tensor in source.plain.items())


@pytest.mark.parametrize("name", METHODS)
def test_any_settings_and_shapes_are_read_or_refused(quantised, name) -> None:
    """Whatever stands under a key, or is the shape of a tensor: values, or a refusal that is ours."""
    snapshot = open_snapshot(quantised(name)[0])
    key = METHODS[name].key
    settings = snapshot.config[key]
    for entry in settings:
        for junk in (None, "x", "8", [], {}, [3], {"a": {}}, -1, 0, 1.5, True):
            config = {**snapshot.config, key: {**settings, entry: junk}}
            first_values(replace(snapshot, config=config, hashes={}))
    expert = f"model.layers.0.mlp.{'switch_mlp' if key == 'quantization' else 'experts.0'}.up_proj."
    for changed in [part for part in snapshot.tensors if part.startswith(expert)]:
        for shape in ((), (0,), (3,), (4, 0), (2, 2, 2, 2)):
            slot = replace(snapshot.tensors[changed], shape=shape)
            first_values(replace(snapshot, tensors={**snapshot.tensors, changed: slot}, hashes={}))


def first_values(snapshot) -> None:
    with contextlib.suppress(ShapeMoeError, KeyError):  # no such plain tensor, where a part is not taken for one
        snapshot.plain["model.layers.0.mlp.experts.0.up_proj.weight"].values()


def test_a_missing_part_is_named(quantised, tmp_path) -> None:
    key = "model.layers.2.mlp.experts.0.up_proj"
    source = changed(quantised("gptq")[0], {}, tmp_path, lambda tensors: tensors.pop(f"{key}.qzeros"))
    with pytest.raises(CheckpointError, match=rf"{key}.qweight is there, but not {key}.qzeros"):
        _ = source.plain


def test_parts_that_do_not_fit_are_named_and_nothing_is_random(quantised, tmp_path) -> None:
    key = "model.layers.2.mlp.experts.0.up_proj"

    def edit(tensors) -> None:
        tensors[f"{key}.scales"] = tensors[f"{key}.scales"][:, :20].contiguous()

    source = changed(quantised("gptq")[0], {}, tmp_path, edit)
    with pytest.raises(CheckpointError, match=rf"{key}.weight cannot be dequantised.*{key}.scales \(4, 20\)"):
        load_model(source, device="cpu")
