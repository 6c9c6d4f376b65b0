"""An experiment's file: what it may say, and one sentence that names the key for everything else."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from shape_moe.calibration.presets import presets
from shape_moe.embedded_model import embedded_model_path
from shape_moe.errors import UsageError
from shape_moe.experiments.config import ExamplesSpec, TaskSpec
from shape_moe.experiments.reader import read_config
from shape_moe.scoring.registry import scorers
from shape_moe.selection.rules import get_rule
from support.data import write_lines

ROOT = Path(__file__).parents[2]
PAPER = [ROOT / "examples" / "paper" / name for name in ("paper.yaml", "paper-further-tasks.yaml")]


@pytest.fixture
def write(tmp_path):
    """Write a configuration that is right but for some changes; a key set to None is left out."""
    write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}])

    def make(text=None, **changes):
        content = {
            "models": ["embedded"],
            "calibration": {"a": {"data": "a.jsonl"}},
            "keep": [0.5],
            "evaluation": {"e": {"data": "a.jsonl"}},
            **changes,
        }
        file = tmp_path / "grid.yaml"
        file.write_text(text or yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return file

    return make


def test_defaults_and_places(write, tmp_path):
    config = read_config(write(output="results"))
    assert [spec.model for spec in config.models] == [str(embedded_model_path())]
    assert config.calibration[0].tracing.data.source == str(tmp_path / "a.jsonl")
    assert [method.pair for method in config.methods] == ["shape/coverage"]
    assert config.routings == ("drop",)
    assert config.evaluation[0].calibration == ("a",)
    assert config.output == str(tmp_path / "results")
    assert (config.selections, config.cells) == (1, 1)


def test_scorers_and_rules_are_a_product_and_random_has_its_seeds(write):
    config = read_config(write(scorers=["shape", "random"], rules=["coverage", "global"], random_seeds=[3, 4]))
    found = [(method.pair, method.seed) for method in config.methods]
    assert found == [
        ("shape/coverage", None),
        ("shape/global", None),
        ("random/coverage", 3),
        ("random/coverage", 4),
        ("random/global", 3),
        ("random/global", 4),
    ]
    assert config.scoring(config.methods[3]).seed == 4


def test_options_reach_their_place(write):
    evaluation = {
        "e": {"data": "a.jsonl", "samples": 7, "generate": 3, "answer_pattern": "#(.*)", "template": False},
        "lm": {"task": "gsm8k", "limit": 5, "fewshot": 0, "metrics": ["exact_match,strict-match"]},
    }
    config = read_config(write(evaluation=evaluation, calibration={"a": {"data": "a.jsonl", "map": {"text": "t"}}}))
    examples, task = config.evaluation
    assert isinstance(examples, ExamplesSpec)
    assert isinstance(task, TaskSpec)
    assert (examples.tracing.data.samples, examples.tracing.tokens.template) == (7, False)
    assert examples.generation is not None
    assert (examples.generation.examples, examples.generation.answer_pattern) == (3, "#(.*)")
    assert (task.limit, task.fewshot) == (5, 0)
    assert config.calibration[0].tracing.data.fields == {"text": "t"}


def told(**changes):
    """An evaluation with published figures of the embedded model."""
    percent = {"embedded": {"dense": 90, "shape/coverage": {"50%": 80.5}}}
    return {"e": {"data": "a.jsonl", "published": {"metric": "exact_match", "percent": percent, **changes}}}


def test_published_figures_reach_their_evaluation(write):
    config = read_config(write(evaluation=told(source="a paper", routing="reroute,trained")))
    published = config.evaluation[0].published
    assert published.percent == {"embedded": {"dense": 90, "shape/coverage": {"0.5": 80.5}}}
    assert (published.source, published.routing, published.differences) == ("a paper", "reroute, trained", ())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "top1"}, "published.metric: 'top1' is not among the metrics"),
        ({"percent": {"other": {"dense": 1}}}, "published.percent: there is no model 'other'"),
        (
            {"percent": {"embedded": {"dense": {"50%": 1}}}},
            "percent.embedded.dense: a method's figures are given by keep",
        ),
        ({"percent": {"embedded": {"reap/uniform": 5}}}, "reap/uniform: a method's figures are given by keep rate"),
        ({"percent": {"embedded": {"reap/uniform": {"half": 5}}}}, "'half' is not a keep rate"),
        ({"percent": {"embedded": {"dense": 101}}}, "dense: figures are given in percent"),
        ({"percent": {"embedded": {"reap/best": {"50%": 5}}}}, "reap/best: There is no rule 'best'"),
        ({"routing": "sideways"}, "published.routing: Routing must be"),
        ({"colour": "red"}, "published.colour is not a key"),
        ({"percent": None}, "published.percent is missing"),
    ],
)
def test_a_mistake_in_published_figures_is_named_by_its_key(write, changes, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        read_config(write(evaluation=told(**changes)))


def test_gate_scales_are_a_part_of_routings(write):
    config = read_config(write(routings=["drop", "reroute,trained"]))
    assert config.routings == ("drop", "reroute, trained")
    routed = [config.methods[0].routed_by(routing) for routing in config.routings]
    assert [(m.routing, m.gate_scale) for m in routed] == [("drop", "survivors"), ("reroute", "trained")]
    assert config.only(routing=["reroute, trained"]).routings == ("reroute, trained",)


def test_presets_are_read_from_the_hub_or_from_a_copy_beside_the_file(write, tmp_path):
    config = read_config(write(calibration={"a": {"data": "preset:gsm8k"}, "b": {"data": "preset:gsm8k@c/d.jsonl"}}))
    copy = tmp_path / "c" / "d.jsonl"
    assert [spec.tracing.data.source for spec in config.calibration] == ["preset:gsm8k", f"preset:gsm8k@{copy}"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sed": 1}, ["sed is not a key", "did you mean seed?"]),
        ({"calibration": {"a": {"data": "a.jsonl", "sampels": 3}}}, ["calibration.a.sampels", "mean samples?"]),
        ({"scorers": ["shap"]}, ["scorers", "no scorer 'shap'"]),
        ({"methods": ["shape/cover"]}, ["methods", "'cover'"]),
        ({"methods": ["shape/"]}, ["methods", "'shape/' is not a method"]),
        ({"methods": ["shape, drop"]}, ["methods", "write shape/coverage; routings and target say the rest"]),
        ({"methods": ["shape/coverage"], "rules": ["global"]}, ["methods stands for scorers and rules"]),
        ({"routings": ["droop"]}, ["routings", "'droop'"]),
        ({"calibration": {"a": {"data": "b.jsonl"}}}, ["calibration.a.data", "there is no file", "b.jsonl"]),
        ({"calibration": {"a": {"data": "./b"}}}, ["calibration.a.data", "there is no file", "/b"]),
        ({"models": []}, ["models is empty"]),
        ({"models": None}, ["models is missing"]),
        ({"models": "embedded"}, ["models must be a list"]),
        ({"models": ["embedded", "embedded"]}, ["models names embedded twice"]),
        ({"models": [{"model": "x/a"}, {"model": "y/a"}]}, ["two of them are called 'a'"]),
        ({"models": ["./nowhere"]}, ["models", "no folder", "nowhere"]),
        ({"calibration": {}}, ["calibration is empty"]),
        ({"calibration": {"a/b": {"data": "a.jsonl"}}}, ["'a/b' cannot be a name"]),
        ({"calibration": {"a": {"data": "b.jsonl"}}}, ["calibration.a.data", "no file", "b.jsonl"]),
        ({"calibration": {"a": {"data": "preset:gsm9k"}}}, ["calibration.a", "no preset 'gsm9k'"]),
        ({"calibration": {"a": {"data": "a.jsonl", "samples": 0}}}, ["calibration.a", "at least 1"]),
        ({"calibration": {"a": {"data": "a.jsonl", "samples": "many"}}}, ["a.samples must be a whole number"]),
        ({"calibration": {"a": {"data": "a.jsonl", "skip_bad": 1}}}, ["a.skip_bad must be true or false"]),
        ({"calibration": {"a": {"data": "a.jsonl", "map": {"text": 3}}}}, ["a.map: every value must be text."]),
        ({"calibration": {"a": {"data": "a.jsonl", "seed": 3}}}, ["calibration.a.seed is not a key"]),
        ({"calibration": {"a": {"samples": 3}}}, ["calibration.a.data is missing"]),
        ({"calibration": {"a": {"data": ["a.jsonl"]}}}, ["calibration.a.data must be text, not a list."]),
        ({"models": [{"name": "a"}]}, ["models, entry 1.model is missing."]),
        ({"models": [3]}, ["models, entry 1 must be a mapping of keys to values, not 3."]),
        ({"routings": [1]}, ["routings, entry 1 must be text, not 1."]),
        ({"evaluation": {"e": {"task": "gsm8k", "fewshot": "0"}}}, ["e.fewshot must be a whole number, not '0'."]),
        ({"evaluation": {"e": {"task": "gsm8k", "batch_size": 0}}}, ["e.batch_size must be at least 1, not 0."]),
        ({"evaluation": {"e": {"task": "gsm8k", "metrics": []}}}, ["evaluation.e.metrics is empty"]),
        ({"evaluation": {"e": {"data": "a.jsonl", "generate": -1}}}, ["evaluation.e: ", "at least 1"]),
        ({"keep": []}, ["keep is empty"]),
        ({"keep": [1.5]}, ["keep", "1.5"]),
        ({"keep": [True]}, ["keep, entry 1 must be a number"]),
        ({"evaluation": {"e": {}}}, ["evaluation.e needs either data"]),
        ({"evaluation": {"e": {"data": "a.jsonl", "task": "gsm8k"}}}, ["evaluation.e needs either data"]),
        ({"evaluation": {"e": {"task": "ours.yaml"}}}, ["evaluation.e.task", "no file", "ours.yaml"]),
        ({"evaluation": {"e": {"task": "gsm8k", "limit": 0}}}, ["evaluation.e.limit must be at least 1"]),
        ({"evaluation": {"e": {"data": "a.jsonl", "calibration": ["b"]}}}, ["no calibration task 'b'"]),
        ({"evaluation": {"e": {"data": "a.jsonl", "metrics": ["f1"]}}}, ["no figure 'f1'"]),
        ({"evaluation": {"e": {"data": "a.jsonl", "metrics": ["generated_exact_match"]}}}, ["needs generate"]),
        ({"evaluation": {"e": {"data": "a.jsonl", "answer_pattern": "("}}}, ["evaluation.e", "regular expression"]),
        ({"random_seeds": [1]}, ["random_seeds needs scorer random"]),
        ({"seed": "one"}, ["seed must be a whole number, not 'one'"]),
        (
            {"calibration": {"a": {"data": "a.jsonl"}, "b": {"data": "a.jsonl"}},
             "evaluation": {"e": {"data": "a.jsonl", "calibration": ["a"]}}},
            ["calibration.b is judged by none"],
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_key(write, changes, words):
    with pytest.raises(UsageError) as caught:
        read_config(write(**changes))
    message = str(caught.value)
    assert message.startswith("grid.yaml: ")
    assert message.count("\n") == 0
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keep: [0.5]\nkeep: [0.6]\n", ["line 1", "'keep' is there twice"]),
        ("keep: [0.5\n", ["not valid YAML"]),
        ("- a\n", ["must be a mapping"]),
    ],
)
def test_what_is_no_grid_at_all_is_refused(write, text, words):
    with pytest.raises(UsageError) as caught:
        read_config(write(text=text))
    for word in words:
        assert word in str(caught.value)


def test_a_part_of_the_grid(write):
    calibration = {"a": {"data": "a.jsonl"}, "b": {"data": "a.jsonl"}}
    evaluation = {
        "ea": {"data": "a.jsonl", "calibration": ["a"]},
        "eb": {"data": "a.jsonl", "calibration": ["b"]},
    }
    config = read_config(write(calibration=calibration, evaluation=evaluation, keep=[0.5, 0.6], scorers=["shape"]))
    part = config.only(calibration=["b"], keep=["0.6"])
    assert [spec.name for spec in part.evaluation] == ["eb"]
    assert ([spec.name for spec in part.calibration], part.keep, part.cells) == (["b"], (0.6,), 1)
    assert config.only() == config
    with pytest.raises(UsageError, match="no keep '0.7'; it has 0.5, 0.6"):
        config.only(keep=["0.7"])
    with pytest.raises(UsageError, match="no 'task'"):
        config.only(task=["a"])
    with pytest.raises(UsageError, match="Nothing is left"):
        config.only(calibration=["a"], evaluation=["eb"])


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_the_paper_names_only_what_there_is(file):
    config = read_config(file)
    for spec in config.calibration:
        assert spec.tracing.data.source.removeprefix("preset:") in presets()
        assert spec.tracing.data.samples == 25
    for method in config.methods:
        assert method.scorer in scorers()
        get_rule(method.rule)
    assert {spec.name for spec in config.evaluation} == {spec.name for spec in config.calibration}
    for spec in config.evaluation:  # what is judged by is never the split that is calibrated on
        assert spec.calibration == (spec.name,)
        if isinstance(spec, ExamplesSpec) and spec.tracing.data.source.startswith("preset:"):
            preset = presets()[spec.tracing.data.source.removeprefix("preset:")]
            assert spec.tracing.data.split != preset.default_split


def test_the_papers_grids_hold_every_preset_once():
    named = [spec.name for file in PAPER for spec in read_config(file).calibration]
    assert sorted(named) == sorted(presets())


def test_the_papers_figures_are_those_of_its_averages():
    """The averages over seven tasks are published as well; TruthfulQA, which is not compared, is the seventh."""
    spread = {
        ("Qwen3-30B-A3B", "dense", None): (82.92, 77.60),
        ("Qwen3-30B-A3B", "shape/coverage", "0.8"): (82.43, 75.64),
        ("Qwen3-30B-A3B", "shape/coverage", "0.6"): (81.31, 73.16),
        ("Qwen3-30B-A3B", "easy-ep/uniform", "0.6"): (79.05, 73.28),
        ("Qwen3-30B-A3B", "reap/uniform", "0.6"): (74.22, 43.12),
        ("Qwen3-30B-A3B", "random/uniform", "0.8"): (50.42, 42.31),
        ("gpt-oss-20b", "shape/coverage", "0.6"): (79.02, 75.23),
        ("DeepSeek-V2-Lite", "dense", None): (62.08, 48.27),
        ("DeepSeek-V2-Lite", "shape/coverage", "0.8"): (62.44, 47.62),
    }
    told = [spec.published.percent for spec in read_config(PAPER[0]).evaluation if spec.published]
    assert len(told) == 6
    for (model, method, keep), (average, missing) in spread.items():
        found = [percent[model][method] if keep is None else percent[model][method][keep] for percent in told]
        assert (sum(found) + missing) / 7 == pytest.approx(average, abs=0.0051)


def test_the_boxed_answer_of_a_solution_is_found():
    spec = next(spec for spec in read_config(PAPER[0]).evaluation if spec.name == "math-500")
    assert isinstance(spec, ExamplesSpec)
    assert spec.generation is not None
    found = re.findall(str(spec.generation.answer_pattern), r"so $\boxed{\frac{\sqrt{3}}{2}}$. Not \boxed{7}.")
    assert found == [r"\frac{\sqrt{3}}{2}", "7"]


def test_the_tiny_examples_data_is_what_its_script_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts" / "make_tiny_experiment_data.py")
    assert spec is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)  # type: ignore[union-attr]
    script.write_data(tmp_path)
    files = sorted(script.FOLDER.glob("*.jsonl"))
    assert [file.name for file in files] == sorted(file.name for file in tmp_path.iterdir())
    for file in files:
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
