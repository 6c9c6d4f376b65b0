"""Every path is what it says: no name is a pattern, an address, a chain or markup, whatever stands in it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from shape_moe.calibration.reading import load_records
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.main import run
from shape_moe.demo.tasks import examples
from shape_moe.errors import ServingError
from shape_moe.experiments.reader import read_config
from shape_moe.jobs.verify import verify
from shape_moe.literal_paths import check_plain, expand_home, plain_model, plain_name
from shape_moe.scoring.scores import read_scores
from shape_moe.selection.selection import load_selection
from shape_moe.tracing.coalitions import read_table
from shape_moe.tracing.trace import load_trace
from support.data import synthetic_trace, write_lines
from support.gguf_files import chats, gguf_model, save_gguf

PAIRS = [
    ("t[1]", "t1"),
    ("a?b", "a*b"),
    ("{x,y}", "x"),
    ("[b]bold", "bold"),
    ("~x", "x"),
    ("with space", "withspace"),
    ("100%20", "100 "),
    ("a#b", "a"),
    ("zip::x", "zip"),
    ("file:x", "x"),
    ("**", "any"),
]
"""A hostile name, and one that it could be taken for."""
NAMES = [name for name, _ in PAIRS]


def rows(seed: int, count: int = 8) -> list[dict]:
    return examples("sorting", count, seed=seed)


@pytest.mark.parametrize(("name", "decoy"), PAIRS, ids=NAMES)
def test_traces_are_read_where_they_lie(tmp_path, monkeypatch, name, decoy) -> None:
    """Also by a relative name, and beside a folder that the name could be taken for."""
    monkeypatch.chdir(tmp_path)
    synthetic_trace(seed=1).save(Path(name))
    synthetic_trace(seed=2).save(Path(decoy))
    for path in (Path(name), tmp_path / name):
        for layer, table in load_trace(path).coalitions.items():
            expected = synthetic_trace(seed=1).coalitions[layer]
            np.testing.assert_array_equal(table.counts, expected.counts)
            np.testing.assert_array_equal(table.members, expected.members)
    assert read_table(Path(name, "coalitions", "layer-000.parquet"), 2).counts.sum() > 0


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv", "folder"])
@pytest.mark.parametrize(("name", "decoy"), PAIRS, ids=NAMES)
def test_data_is_read_where_it_lies(tmp_path, monkeypatch, name, decoy, kind) -> None:
    monkeypatch.chdir(tmp_path)
    for place, seed in ((name, 1), (decoy, 2)):
        frame = pl.DataFrame(rows(seed))
        if kind == "folder":
            import datasets

            datasets.Dataset.from_list(rows(seed)).save_to_disk("plain")
            Path("plain").rename(place)
        elif kind == "jsonl":
            write_lines(Path(f"{place}.jsonl"), rows(seed))
        elif kind == "json":
            Path(f"{place}.json").write_text(frame.write_json())
        else:
            with Path(f"{place}.{kind}").open("wb") as stream:
                frame.write_parquet(stream) if kind == "parquet" else frame.write_csv(stream)
    source = name if kind == "folder" else f"{name}.{kind}"
    for path in (source, str(tmp_path / source)):
        assert [record.prompt for record in load_records(DataOptions(path))] == [row["prompt"] for row in rows(1)]


@pytest.mark.parametrize(("name", "decoy"), PAIRS, ids=NAMES)
def test_tables_of_values_are_read_where_they_lie(tmp_path, monkeypatch, name, decoy) -> None:
    monkeypatch.chdir(tmp_path)
    for place, value in ((name, 1.0), (decoy, 2.0)):
        Path(f"{place}.csv").write_text(f"Layer,Expert_ID,Total_Activations,Shapley_Value\n0,0,5,{value}\n0,1,5,0.5\n")
    assert read_scores(f"{name}.csv").values.max() == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_plain_names_lead_to_the_same_folder(tmp_path, name) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "file").write_text(name)
    with plain_name(folder) as plain, plain_model(folder) as model:
        assert (plain / "file").read_text() == (Path(model) / "file").read_text() == name
        assert not set("[]*?{}:#% ~") & set(f"{plain}{model}")
    assert plain == folder or not plain.exists()
    assert (folder / "file").read_text() == name
    with plain_model("someone/model") as model:
        assert model == "someone/model"


def test_vllm_is_not_given_patterns(tmp_path) -> None:
    for name in ("t[1]", "a?b", "a*b"):
        (tmp_path / name).mkdir()
        with pytest.raises(ServingError, match="reads the name .* as a pattern"):
            check_plain(str(tmp_path / name), "vLLM")
    (tmp_path / "t1").mkdir()
    check_plain(str(tmp_path / "t1"), "vLLM")
    check_plain("someone/model", "vLLM")


def test_the_plugin_refuses_patterns(tmp_path, monkeypatch) -> None:
    """Whoever starts vLLM themselves is told before any weight is looked for."""
    from types import SimpleNamespace

    from shape_moe.serving.vllm import registration

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0"))
    (tmp_path / "t[1]").mkdir()
    config = SimpleNamespace(model_config=SimpleNamespace(model=str(tmp_path / "t[1]"), hf_config=None))
    with pytest.raises(ServingError, match="reads the name .* as a pattern"):
        registration._checked(object).verify_and_update_config(config)


def test_only_the_own_home_is_expanded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand_home("~/data") == Path("/home/somebody/data")
    assert expand_home("~x/data") == Path("~x/data")
    write_lines(tmp_path / "~x.jsonl", rows(1))
    (tmp_path / "grid.yaml").write_text(
        "models: [embedded]\ncalibration: {t: {data: ~x.jsonl}}\nmethods: [shape/coverage]\nkeep: [0.5]\n"
        "evaluation: {t: {data: ~x.jsonl}}\n"
    )
    config = read_config(tmp_path / "grid.yaml")
    assert config.calibration[0].tracing.data.source == str(tmp_path / "~x.jsonl")


@pytest.mark.parametrize(("name", "decoy"), [("t[1] ?*{x,y}#%20::~", "t1")])
def test_from_a_trace_to_a_report(embedded, tmp_path, monkeypatch, capsys, name, decoy) -> None:
    """Everything lies in a hostile folder and has a hostile name, beside what it could be taken for."""
    home = tmp_path / "[" / "b]" / name  # [/b] would end bold letters that never began
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    model = shutil.copytree(embedded, home / f"model{name}")
    write_lines(Path(f"{name}.jsonl"), rows(1, 16))
    write_lines(Path(f"{decoy}.jsonl"), rows(2, 16))

    def call(*words: object) -> str:
        code = run([str(word) for word in words])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    here = ("--device", "cpu", "-q")
    call("trace", embedded, "--data", f"{decoy}.jsonl", "-o", f"{decoy}-t", *here)
    assert name in call("trace", model.name, "--data", f"{name}.jsonl", "-o", f"{name}-t", *here)
    traced = load_trace(f"{name}-t")
    assert traced.info.source["data"].endswith(f"{name}.jsonl")
    call("select", f"{name}-t", "--keep", 0.6, "-o", f"{name}.s.json", "-q")
    call("score", f"{name}-t", "--csv", f"{name}.csv", "-q")
    assert read_scores(f"{name}.csv").num_experts == 32
    assert name in call("prune", model.name, "--selection", f"{name}.s.json", "-o", f"{name}-p", *here)
    assert load_selection(f"{name}-p").layers == load_selection(f"{name}.s.json").layers
    call("verify", f"{name}-p", "--original", model.name, *here)
    call("report", f"{name}-t", "-o", f"{name}.html", "-q")
    assert Path(f"{name}.html").stat().st_size > 10_000
    figures = ("evaluate", model.name, f"{name}.s.json", "--data", f"{decoy}.jsonl", "-o", f"{name}.e.json")
    assert name in call(*figures, "--no-footprint", "--no-general", "--generate", 0, *here)
    assert list(home.parent.iterdir()) == [home]
    assert not [path for path in home.iterdir() if not path.name.startswith((name, decoy, f"model{name}"))]


@pytest.mark.parametrize(("name", "decoy"), [("t[1] ?*{x,y}#%20::~", "t1")])
def test_gguf_files_layers_and_folders_of_data(tmp_path, monkeypatch, name, decoy) -> None:
    """A GGUF file is pruned layer by layer by a folder of data, beside what each of the names could be taken for."""
    home = tmp_path / "[" / name
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    for place, seed in ((name, 0), (decoy, 1)):
        save_gguf(gguf_model("qwen3_moe", seed=seed), home / f"{place}.gguf")
        Path(place).mkdir()
        write_lines(Path(place, f"{place}.jsonl"), chats(8 + 2 * seed))
    here = ("--no-judge", "--no-logits", "--stream", "--device", "cpu", "-q")
    words = ("prune", f"{name}.gguf", "--data", name, "--keep", 0.75, "-o", f"{name}-p.gguf", *here)
    assert run([str(word) for word in words]) == 0
    assert all(check.passed is not False for check in verify(f"{name}-p.gguf", original=f"{name}.gguf", device="cpu"))
    assert load_trace(f"{name}-p.shape/shape/trace").info.examples == 8
    left = {name, decoy, f"{name}.gguf", f"{decoy}.gguf", f"{name}-p.gguf", f"{name}-p.shape"}
    assert {path.name for path in home.iterdir()} == left


def test_a_folder_whose_files_have_any_names(tmp_path) -> None:
    """Every file is read once, whatever it is called, also where two names differ in such letters alone."""
    folder = tmp_path / "data"
    (folder / "b[0]").mkdir(parents=True)
    names = [*(name for name, _ in PAIRS), "t-1-", "t*1?", "b[0]/c?d"]
    for seed, name in enumerate(names):
        write_lines(folder / f"{name}.jsonl", rows(seed, 2))
    told = sorted(record.prompt for record in load_records(DataOptions(str(folder))))
    assert told == sorted(row["prompt"] for seed in range(len(names)) for row in rows(seed, 2))


def test_splits_are_told_by_names_of_any_letters(tmp_path) -> None:
    for seed, split in enumerate(("train", "test")):
        write_lines(tmp_path / f"[a]*-{split}.jsonl", rows(seed, 3))
    for seed, split in enumerate(("train", "test")):
        found = load_records(DataOptions(str(tmp_path), split=split))
        assert [record.prompt for record in found] == [row["prompt"] for row in rows(seed, 3)]
