"""``examples/paper/selections.py``: published selections beside ours."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "paper" / "selections.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_selections", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def made_up(folder: Path, *, moved: bool = False) -> Path:
    """Values of one task and what coverage keeps of them at 0.5, in the layout of a clone."""
    values = folder / "results/qwen3-30b-a3b/shapley_values/gsm8k_25_shapley.csv"
    chosen = folder / "results/qwen3-30b-a3b/selected_experts/shapley_alpha_per_layer_gsm8k_25_rate0_8.json"
    for file in (values, chosen):
        file.parent.mkdir(parents=True)
    rows = [f"{layer},{expert},{10 - expert},{2.0 ** (5 - expert)}" for layer in (0, 1) for expert in range(5)]
    values.write_text("\n".join(["Layer,Expert_ID,Total_Activations,Shapley_Value", *rows]) + "\n")
    layers = {"0": [0, 1, 2, 3], "1": [0, 1, 2, 4] if moved else [0, 1, 2, 3]}
    chosen.write_text(json.dumps({**layers, "_metadata": {"total_experts": 10, "selected_experts": 8}}))
    return folder


def test_equal_selections_are_told(script, tmp_path, capsys) -> None:
    assert script.main([str(made_up(tmp_path))]) == 0
    shown = capsys.readouterr().out
    assert "gsm8k     keep 0.8: published 8 experts, ours 8; the same experts in every layer" in shown
    assert "1 of 1 published selections are ours" in shown


def test_a_layer_that_differs_is_named(script, tmp_path, capsys) -> None:
    assert script.main([str(made_up(tmp_path, moved=True))]) == 1
    shown = capsys.readouterr().out
    assert "1 layers differ: 1" in shown
    assert "0 of 1 published selections are ours" in shown


def test_a_folder_without_them_gets_one_sentence(script, tmp_path, capsys) -> None:
    assert script.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"Error: {tmp_path} holds no published values with their selections.\n"


def test_files_that_are_not_the_published_ones_are_refused(script, tmp_path, monkeypatch) -> None:
    asked = []

    class Reply:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self) -> bytes:
            return b"Layer,Expert_ID\n"

    monkeypatch.setattr(script.urllib.request, "urlopen", lambda address, **_: asked.append(address) or Reply())
    with pytest.raises(OSError, match="gsm8k_25_shapley.csv is not the published file"):
        script.fetch(tmp_path)
    assert asked == [
        "https://raw.githubusercontent.com/Alizen-1009/Shapley-Moe/46ff4a16a3b6018d5f118247c3fa75f611648875/"
        "results/qwen3-30b-a3b/shapley_values/gsm8k_25_shapley.csv"
    ]


def test_the_published_selections_are_ours(script, reference: Path, tmp_path, capsys) -> None:
    """The values at hand, under the names that they have in the authors' repository and under short ones."""
    assert script.main([str(reference)]) == 0
    assert "2 of 2 published selections are ours" in capsys.readouterr().out
    for keep in (None, *script.KEEP_RATES):
        short = "gsm8k_shapley_values.csv" if keep is None else f"gsm8k_selected_experts_keep{keep}.json"
        file = tmp_path / script._published("gsm8k", keep)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reference / short, file)
        name = "gsm8k" if keep is None else f"gsm8k {keep}"
        assert script.hashlib.sha256(file.read_bytes()).hexdigest() == script.SHA256[name]
    assert [(row.task, row.keep, row.different) for row in script.compare(tmp_path)] == [
        ("gsm8k", 0.8, ()),
        ("gsm8k", 0.6, ()),
    ]
