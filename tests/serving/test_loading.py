"""How the world loads a pruned checkpoint: with the package, with its code alone, and not at all without either."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shape_moe.architectures.snapshot import open_snapshot
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.pruning.masks import masked
from shape_moe.pruning.modeling_shape_moe import pruned_class
from shape_moe.pruning.surgery import prune_model
from support.closeness import FLOAT32, relative_error
from support.selections import random_selection
from support.tiny_models import make_model, random_tokens

NAMES = ("qwen3_moe", "gpt_oss", "deepseek_v2", "mixtral", "olmoe", "qwen2_moe")
HIDE_PACKAGE = "import sys; sys.modules['shape_moe'] = None\n"


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory):
    """Pruned checkpoints by family and routing, written by the job, with the selection and expected logits."""
    made = {}

    def get(name: str, routing: str):
        if (name, routing) not in made:
            selection = random_selection(open_snapshot(checkpoint(name)), routing, "ragged")
            out = tmp_path_factory.mktemp("pruned") / f"{name}-{routing}"
            prune(checkpoint(name), out, PruneOptions(device="cpu"), selection=selection)
            model = make_model(name)
            with masked(model, selection), torch.no_grad():
                logits = model(input_ids=random_tokens(2, 16)).logits
            made[name, routing] = (out, logits)
        return made[name, routing]

    return get


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )


CASES = [(name, routing) for name in NAMES for routing in ("drop", "reroute")]
CASES += [(name, "reroute, trained") for name in ("qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v2_grouped")]


def key_of(name: str, routing: str) -> str:
    return f"{name}-{routing.replace(', ', '+')}"


def load_all(pruned, folder: Path, code: str) -> dict[str, str]:
    """Run code once in a process without the package, for every pruned checkpoint: its output lines by case."""
    inputs = {}
    for name, routing in CASES:
        checkpoint, expected = pruned(name, routing)
        key = key_of(name, routing)
        torch.save((str(checkpoint), random_tokens(2, 16), expected), folder / f"{key}.pt")
        inputs[key] = str(folder / f"{key}.pt")
    (folder / "inputs.json").write_text(json.dumps(inputs))
    result = run(
        HIDE_PACKAGE + "import json, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "for case, file in json.load(open(sys.argv[1])).items():\n"
        "    path, tokens, expected = torch.load(file)\n" + code,
        folder / "inputs.json",
    )
    assert result.returncode == 0, result.stderr
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if "-" in line.split(maxsplit=1)[0])


@pytest.fixture(scope="module")
def remote(pruned, tmp_path_factory) -> dict[str, str]:
    return load_all(
        pruned,
        tmp_path_factory.mktemp("remote"),
        "    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()\n"
        "    fast = model.config._experts_implementation\n"
        "    with torch.no_grad(): found = model(input_ids=tokens).logits\n"
        "    error = float((found - expected).abs().max() / expected.square().mean().sqrt())\n"
        "    model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False)\n"
        "    model.set_experts_implementation('eager')\n"
        "    print(case, type(model).__name__, fast, model.config._experts_implementation, error)\n",
    )


@pytest.fixture(scope="module")
def stock(pruned, tmp_path_factory) -> dict[str, str]:
    return load_all(
        pruned,
        tmp_path_factory.mktemp("stock"),
        "    try:\n"
        "        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)\n"
        "        print(case, 'loaded')\n"
        "    except (RuntimeError, ValueError) as error:\n"
        "        print(case, ' '.join(str(error).split()).lower())\n",
    )


@pytest.mark.parametrize(("name", "routing"), CASES)
def test_remote_code_needs_no_package_and_is_fast(remote, name, routing) -> None:
    kind, fast, switched, error = remote[key_of(name, routing)].split()
    assert kind.startswith("Shape")
    assert (fast, switched) == ("grouped_mm", "eager")
    assert float(error) <= FLOAT32


@pytest.mark.parametrize(("name", "routing"), CASES)
def test_without_package_and_remote_code_loading_fails_loudly(stock, name, routing) -> None:
    assert "mismatch" in stock[key_of(name, routing)]


@pytest.mark.parametrize("order", ["shape_moe first", "transformers first", "model first"])
def test_import_order_does_not_matter(pruned, checkpoint, order) -> None:
    folder, _ = pruned("qwen3_moe", "drop")
    imports = {
        "shape_moe first": "import shape_moe\nfrom transformers import AutoModelForCausalLM\n",
        "transformers first": "from transformers import AutoModelForCausalLM\nimport shape_moe\n",
        "model first": "import transformers.models.qwen3_moe.modeling_qwen3_moe\nimport shape_moe\n"
        "from transformers import AutoModelForCausalLM\n",
    }
    result = run(
        imports[order] + "import sys\n"
        "for path in sys.argv[1:]: print(type(AutoModelForCausalLM.from_pretrained(path)).__name__)\n",
        folder,
        checkpoint("qwen3_moe"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["ShapeQwen3MoeForCausalLM", "Qwen3MoeForCausalLM"]


def test_importing_the_package_is_light() -> None:
    code = "import sys, shape_moe; print('torch' in sys.modules, 'transformers' in sys.modules, 'numpy' in sys.modules)"
    assert run(code).stdout.split() == ["False"] * 3


@pytest.mark.parametrize(("name", "routing"), CASES)
def test_saving_and_reloading(pruned, tmp_path, name, routing) -> None:
    folder, expected = pruned(name, routing)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert relative_error(again(input_ids=random_tokens(2, 16)).logits, expected) <= FLOAT32
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert config["shape_pruning"] == json.loads((folder / "config.json").read_text())["shape_pruning"]
    assert (tmp_path / "again" / "modeling_shape_moe.py").read_text() == (folder / "modeling_shape_moe.py").read_text()
    assert config["auto_map"] == {"AutoModelForCausalLM": f"modeling_shape_moe.{type(model).__name__}"}


@pytest.mark.parametrize("routing", ["drop", "reroute"])
def test_generation_equals_that_of_the_masked_original(checkpoint, tmp_path, routing, embedded) -> None:
    selection = random_selection(open_snapshot(embedded), routing, "ragged")
    prune(embedded, tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=selection)
    original = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    prompt = torch.tensor([list(b"words 4821=")])
    with masked(original, selection):
        expected = original.generate(prompt, max_new_tokens=12, do_sample=False)
    assert model.generate(prompt, max_new_tokens=12, do_sample=False).tolist() == expected.tolist()


def test_device_maps_and_offloading(pruned, tmp_path) -> None:
    for routing in ("drop", "reroute", "reroute, trained"):
        folder, expected = pruned("deepseek_v2", routing)
        maps = [
            "auto",
            {
                "model.embed_tokens": "cpu",
                "model.layers.0": "cpu",
                "model.layers.1": "disk",
                "model.layers.2": "disk",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "disk",
            },
        ]
        for device_map in maps:
            model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path).eval()
            with torch.no_grad():
                assert relative_error(model(input_ids=random_tokens(2, 16)).logits, expected) <= FLOAT32


def test_surgery_on_a_live_model(checkpoint, tmp_path) -> None:
    """Cut in memory, a model gives the masked model's logits, and saves as a pruned checkpoint."""
    for routing in ("drop", "reroute"):
        selection = random_selection(open_snapshot(checkpoint("glm4_moe")), routing, "ragged")
        model, tokens = make_model("glm4_moe"), random_tokens(2, 12)
        cut = prune_model(make_model("glm4_moe"), selection)
        cut.save_pretrained(tmp_path / routing)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / routing).eval()
        with masked(model, selection), torch.no_grad():
            expected = model(input_ids=tokens).logits
        for pruned in (cut, again):
            assert type(pruned).__name__ == "ShapeGlm4MoeForCausalLM"
            with torch.no_grad():
                assert relative_error(pruned(input_ids=tokens).logits, expected) <= FLOAT32
        assert sum(p.numel() for p in cut.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


def test_wrong_configurations_are_refused(checkpoint) -> None:
    model = make_model("qwen3_moe")
    stock = type(model)
    with pytest.raises(ValueError, match="no shape_pruning"):
        pruned_class(stock)(model.config)
    from shape_moe.pruning.modeling_shape_moe import prune_in_place

    good = {
        "version": 1,
        "routing": "drop",
        "num_experts": 16,
        "modules": {"experts": "mlp.experts", "router": "mlp.gate"},
    }
    with pytest.raises(ValueError, match="newer format"):
        prune_in_place(model, {**good, "version": 3, "layers": {}})
    with pytest.raises(ValueError, match="newer format"):
        prune_in_place(model, {**good, "version": 2, "gate_scale": "other", "layers": {}})
    with pytest.raises(ValueError, match=r"no layers \[9\]"):
        prune_in_place(model, {**good, "layers": {"9": [1]}})


def test_classes_are_found_by_name() -> None:
    from shape_moe.pruning import modeling_shape_moe

    assert modeling_shape_moe.ShapeOlmoeForCausalLM is pruned_class(make_model("olmoe").__class__)
    with pytest.raises(AttributeError):
        _ = modeling_shape_moe.ShapeNothing
    with pytest.raises(AttributeError):
        _ = modeling_shape_moe.nothing


def test_compiled_models_give_the_same_logits(pruned) -> None:
    for name, routing in (("qwen3_moe", "drop"), ("olmoe", "reroute, trained")):
        folder, expected = pruned(name, routing)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            assert relative_error(compiled(input_ids=random_tokens(2, 16)).logits, expected) <= FLOAT32


def test_the_bundled_file_is_the_packages_own(pruned) -> None:
    import shape_moe

    folder, _ = pruned("qwen3_moe", "drop")
    own = Path(shape_moe.__file__).parent / "pruning" / "modeling_shape_moe.py"
    assert (folder / "modeling_shape_moe.py").read_text() == own.read_text()
    assert "shape_moe" not in own.read_text().replace("modeling_shape_moe", "").replace("shape_moe_", "")
