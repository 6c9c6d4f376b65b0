"""evaluate, sweep and the limits of prune, as a user types them."""

from __future__ import annotations

import json

import pytest

from shape_moe.demo.tasks import examples
from shape_moe.selection.selection import load_selection
from support.cli import refused
from support.data import write_lines
from support.harness_tasks import write_tasks


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "sorting.jsonl", examples("sorting", 90, seed=6))


QUICK = ("--device", "cpu", "--generate", 8, "--quiet")


def test_from_a_sweep_to_an_evaluated_checkpoint(call, embedded, task_file, tmp_path) -> None:
    swept = tmp_path / "sweep"
    code, out, err = call(
        *("sweep", embedded, "--data", task_file, "--samples", 30, "--held-out-samples", 40, "-o", swept, *QUICK),
        *("--keep", 0.9, "--keep", 0.5, "--method", "easy-ep/uniform, drop", "--max-kl", 0.1),
    )
    assert code == 0, err
    assert "30 examples to calibrate with and 40 held out" in out
    assert "easy-ep/uniform, drop" in out
    assert "recommended" in out
    assert "shape-moe prune" in out
    assert load_selection(swept / "recommended.json").scorer == "easy-ep"

    pruned = tmp_path / "pruned"
    pruning = ("prune", embedded, "--selection", swept / "recommended.json", "-o", pruned, "--device", "cpu", "-q")
    code, _, err = call(*pruning)
    assert code == 0, err

    figures = tmp_path / "figures.json"
    code, out, err = call(
        *("evaluate", embedded, pruned, swept / "recommended.json", "--data", task_file, "--samples", 20, *QUICK),
        *(
            "--no-footprint",
            "--no-general",
            "--by",
            "task",
            "--faithfulness",
            3,
            "--trace",
            swept / "trace",
            "-o",
            figures,
        ),
    )
    assert code == 0, err
    for words in ("figures with 95 % intervals", "worst class is 'sorting'", "Faithfulness of pruned", "random 3"):
        assert words in out
    assert "were used to make" in err
    document = json.loads(figures.read_text())
    kept = [entry["sets"]["task"]["quality"]["nll"]["value"] for entry in document["models"][1:]]
    assert kept[0] == pytest.approx(kept[1], abs=1e-2)  # bfloat16: the checkpoint's own dtype


def test_json_is_one_object(call, embedded, task_file) -> None:
    arguments = ("--samples", 10, *QUICK, "--no-footprint", "--json")
    code, out, err = call("evaluate", embedded, "--data", task_file, *arguments)
    assert code == 0, err
    assert json.loads(out)["models"][0]["kind"] == "dense"
    sweeping = ("sweep", embedded, "--data", task_file, "--keep", 0.9, "--samples", 20, "--held-out-samples", 20)
    code, out, err = call(*sweeping, *QUICK, "--json")
    assert code == 0, err
    assert json.loads(out)["points"][0]["keep_asked"] == 0.9


def test_prune_finds_its_own_way(call, embedded, task_file, tmp_path) -> None:
    few = ("--samples", 30, "--held-out-samples", 30, "--device", "cpu", "--generate", 8)
    auto = ("prune", embedded, "--data", task_file, "--keep", 0.5, "--scorer", "auto", "--routing", "drop")
    code, out, err = call(*auto, "-o", tmp_path / "auto", *few)
    assert code == 0, err
    assert "Judged by 30 held-out examples" in out
    assert "Chosen:" in out
    limited = ("prune", embedded, "--data", task_file, "--max-kl", 0.1, "--no-judge", "-o", tmp_path / "limited")
    code, out, err = call(*limited, *few, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["choice"]["limit"] == {"kind": "max_kl", "value": 0.1}
    assert 0 < document["keep"] < 1


def test_tasks_alone_need_no_examples(call, embedded, tmp_path) -> None:
    pytest.importorskip("lm_eval")
    task = write_tasks(tmp_path / "tasks") / "addition.yaml"
    asked = ("--tasks", task, "--limit", 10, "--device", "cpu", "--no-footprint", "-q")
    code, out, err = call("evaluate", embedded, *asked)
    assert code == 0, err
    assert "lm-evaluation-harness" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "M"), ("--data", "--tasks")),
        (("evaluate", "M", "--samples", 4), ("give --data",)),
        (("evaluate", "M", "--map", "prompt=q", "--no-template"), ("--map, --no-template says how", "give --data")),
        (("evaluate", "M", "--limit", 4), ("has no effect without --tasks",)),
        (("evaluate", "M", "--tasks", " , "), ("at least one task",)),
        (("evaluate", "M", "--tasks", "x", "--engine", "sglang"), ("no engine 'sglang'",)),
        (("evaluate", "M", "--tasks", "x", "--also", "F"), ("give --data",)),
        (("sweep", "M"), ("Give examples",)),
        (("sweep", "M", "--data", "F", "--max-kl", 0.1, "--max-drop", "1%"), ("exclude each other",)),
        (("sweep", "M", "--data", "F", "--max-drop", "much"), ("1% or 0.01",)),
        (("sweep", "M", "--data", "F", "--keep", 0), ("keep rate",)),
        (("sweep", "M", "--data", "F", "--routing", "skip"), ("drop or reroute",)),
        (("sweep", "M", "--data", "F", "--rule", "fair"), ("There is no rule",)),
        (("prune", "M", "--data", "F", "-o", "O"), ("--keep", "--max-drop 1%")),
        (("prune", "M", "--data", "F", "-o", "O", "--keep", 0.5, "--max-kl", 0.1), ("exclude each other",)),
        (
            ("prune", "M", "--data", "F", "-o", "O", "--keep", 0.5, "--held-out", "G", "--scorer", "reap"),
            ("where a method",),
        ),
        (
            ("prune", "M", "--data", "F", "-o", "O", "--keep", 0.5, "--generate", 4, "--rule", "global"),
            ("--generate has no effect where a method is named",),
        ),
        (
            (
                *("prune", "M", "--data", "F", "-o", "O", "--fit", "9GB", "--held-out", "G", "--answer-pattern", "."),
                *("--effort", "thorough", "--preset", "paper"),
            ),
            ("--held-out, --answer-pattern and --effort has no effect where",),
        ),
        (("prune", "M", "--selection", "S", "-o", "O", "--scorer", "auto"), ("leave --scorer out",)),
        (("prune", "M", "--data", "F", "-o", "O", "--keep", 0.5, "--effort", "much"), ("fast, default or thorough",)),
        (("sweep", "M", "--data", "F", "--scorer", "best"), ("There is no scorer",)),
    ],
)
def test_wrong_usage_is_one_sentence(call, embedded, task_file, tmp_path, arguments, words) -> None:
    known = {"M": embedded, "F": task_file, "O": tmp_path / "out", "G": task_file, "S": tmp_path / "s.json"}
    refused(call(*(known.get(argument, argument) for argument in arguments)), 2, *words)


judging = pytest.mark.parametrize(
    "verb", [("prune", "-o", "out", "--keep", 0.5, "--scorer", "auto"), ("sweep",)], ids=lambda verb: verb[0]
)
"""The verbs that judge candidates by examples."""


@judging
@pytest.mark.parametrize(
    ("options", "unread"),
    [
        (("--batch-size", 2), "--batch-size"),
        (("--split", "test", "--subset", "main"), "--split, --subset"),
        (("--map", "prompt=question"), "--map"),
        (("--held-out", "F", "--split", "test", "--map", "prompt=question", "--no-template"), "--no-template"),
    ],
)
def test_options_that_a_trace_leaves_unread_are_refused(call, embedded, tmp_path, verb, options, unread) -> None:
    """Before anything is loaded: neither the trace nor the file is there."""
    name, *arguments = verb
    result = call(name, embedded, "--trace", tmp_path / "trace", *arguments, *options)
    refused(result, 2, f"The trace decides how examples are read: leave {unread} out, or give --data.")


@judging
def test_samples_of_a_finished_trace_are_refused(call, embedded, task_file, tmp_path, verb) -> None:
    name, *arguments = verb
    result = call(name, embedded, "--trace", tmp_path / "t", "--data", task_file, "--samples", 9, *arguments)
    refused(result, 2, "--held-out-samples says how many to judge by, not --samples")


@judging
def test_held_out_examples_are_read_as_split_subset_and_map_say(call, embedded, tmp_path, verb) -> None:
    """Nothing is refused but the trace that is not there."""
    name, *arguments = verb
    other = ("--held-out", tmp_path / "f.jsonl", "--split", "test", "--subset", "main", "--map", "prompt=question")
    refused(call(name, embedded, "--trace", tmp_path / "none", *arguments, *other), 1, "is not a trace")
