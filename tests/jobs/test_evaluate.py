"""Checkpoints and masks beside the dense model, on the embedded model."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest

from shape_moe.calibration.records import DataOptions
from shape_moe.demo.embedded import exact_match
from shape_moe.demo.tasks import examples
from shape_moe.errors import CheckpointError, FingerprintError, ShapeMoeError, UsageError
from shape_moe.evaluation import bench, harness
from shape_moe.evaluation.footprint import Workload, measure_footprint
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.harness import TaskOptions
from shape_moe.evaluation.task_results import task_changes
from shape_moe.jobs import evaluation_run, session
from shape_moe.jobs.evaluate import evaluate
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.progress import Silent
from shape_moe.pruning.masks import masked
from shape_moe.selection.select import SelectOptions
from shape_moe.selection.selection import load_selection
from support.data import write_lines
from support.harness_tasks import write_tasks
from support.interruptions import stopped_after

QUICK = EvaluateOptions(generation=GenerationOptions(examples=10), footprint=None, general=False)


def write(file, tasks: dict[str, int], *, seed: int, held_out: bool = False):
    rows = [row for task, count in tasks.items() for row in examples(task, count, seed=seed, held_out=held_out)]
    return write_lines(file, rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "calibration": write(folder / "calibration.jsonl", {"sorting": 25}, seed=1),
        "task": write(folder / "task.jsonl", {"sorting": 40}, seed=2, held_out=True),
        "also": write(folder / "also.jsonl", {"words": 20, "lookup": 20}, seed=2, held_out=True),
    }


@pytest.fixture(scope="module")
def pruned(embedded, files, tmp_path_factory):
    """A checkpoint that has lost something."""
    out = tmp_path_factory.mktemp("pruned") / "sorting-0.4"
    return prune(embedded, out, PruneOptions(SelectOptions(0.4), device="cpu"), data=files["calibration"]).path


def float32(file, **more) -> ExampleOptions:
    return ExampleOptions(DataOptions(str(file)), device="cpu", dtype="float32", **more)


@pytest.fixture(scope="module")
def evaluated(embedded, files, pruned):
    options = EvaluateOptions(
        also=DataOptions(str(files["also"])),
        by="task",
        generation=GenerationOptions(examples=10),
        footprint=None,
        faithfulness=3,
        general=False,
    )
    selection = pruned / "shape" / "selection.json"
    return evaluate(
        embedded,
        [pruned, selection],
        data=float32(files["task"]),
        options=EvaluateOptions(**{**vars(options), "trace": str(pruned / "shape" / "trace")}),
    )


def test_masks_and_checkpoints_give_the_same_figures(evaluated) -> None:
    _, checkpoint, mask = evaluated.models
    assert (checkpoint.kind, mask.kind) == ("checkpoint", "mask")
    for name in ("task", "also"):
        ours, theirs = checkpoint.sets[name], mask.sets[name]
        for figure in ("nll", "perplexity", "kl", "top1", "exact_match"):
            assert ours.quality[figure].value == pytest.approx(theirs.quality[figure].value, abs=1e-5)
        assert ours.health == theirs.health
    assert checkpoint.size == mask.size
    assert mask.sets["task"].quality["kl"].value > 1e-4  # something was lost


def test_exact_match_is_the_tasks_own(evaluated, embedded_model, pruned) -> None:
    model, tokenizer = embedded_model
    selection = load_selection(pruned / "shape" / "selection.json")
    with masked(model, selection):
        own = exact_match(model, tokenizer, ["sorting"], count=40, seed=2)["sorting"]
    assert evaluated.models[1].sets["task"].quality["exact_match"].value == pytest.approx(own)


def test_what_is_off_the_task_is_judged_beside_it(evaluated) -> None:
    dense, checkpoint, _ = evaluated.models
    assert checkpoint.sets["also"].quality["kl"].value > 10 * checkpoint.sets["task"].quality["kl"].value
    assert dense.sets["also"].change == {}
    assert checkpoint.sets["also"].health.complaints


def test_the_selection_is_better_than_random_and_its_inversion_is_worse(evaluated) -> None:
    assert len(evaluated.faithfulness) == 2
    for check in evaluated.faithfulness:
        assert check.faithful
        assert len(check.random) == 3
        assert check.inverted.quality["kl"].value > 10 * check.kept.quality["kl"].value


def test_the_document_is_json_and_complete(evaluated) -> None:
    document = json.loads(json.dumps(evaluated.document))
    assert [entry["kind"] for entry in document["models"]] == ["dense", "checkpoint", "mask"]
    entry = document["models"][1]
    keep = pytest.approx(0.4, abs=0.01)
    method = {"scorer": "shape", "rule": "coverage", "routing": "drop", "gate_scale": "survivors"}
    assert entry["selection"] == {**method, "keep": keep, "num_layers": 4, "num_experts": 32}
    assert set(entry["sets"]["task"]) == {"quality", "change", "generation"}
    assert entry["classes"]["field"] == "task"
    assert entry["classes"]["by"]["sorting"]["quality"]["nll"] == pytest.approx(entry["sets"]["task"]["quality"]["nll"])


def test_the_worst_class_is_found(embedded, files, pruned, tmp_path) -> None:
    file = write(tmp_path / "both.jsonl", {"sorting": 20, "words": 20}, seed=4, held_out=True)
    result = evaluate(embedded, [pruned], data=float32(file), options=EvaluateOptions(**{**vars(QUICK), "by": "task"}))
    classes = result.document["models"][1]["classes"]
    assert classes["worst"] == "words"
    assert set(classes["by"]) == {"sorting", "words"}
    lost = {name: group["change"]["exact_match"]["value"] for name, group in classes["by"].items()}
    assert lost["words"] < -0.3 < lost["sorting"]


def test_contamination_is_told(embedded, files, pruned) -> None:
    result = evaluate(embedded, [pruned], data=float32(files["calibration"]), options=QUICK)
    assert "25 of 25 examples" in result.notes[0]
    assert result.document["warnings"] == list(result.notes)
    assert not evaluate(embedded, [], data=float32(files["task"]), options=QUICK).notes


def test_prompts_without_answers_are_answered_by_the_dense_model(embedded, files, tmp_path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = examples("sorting", 12, seed=9, held_out=True)
    write_lines(file, [{"prompt": row["prompt"]} for row in rows])
    result = evaluate(embedded, [], data=float32(file), options=QUICK)
    assert result.models[0].sets["task"].quality["exact_match"].value == 1.0


def test_memory_and_speed_are_measured_in_a_process_of_their_own(embedded, pruned) -> None:
    workload = Workload(batch_size=1, prompt_tokens=16, new_tokens=2, repeats=1)
    found = measure_footprint(pruned, device="cpu", workload=workload)
    assert found.device == "cpu"
    assert found.peak_bytes > 2**20
    assert found.load_seconds > 0
    assert found.prefill_tokens_per_second > 0
    assert found.decode_tokens_per_second > 0
    with pytest.raises(ShapeMoeError, match="could not be measured"):
        measure_footprint(pruned / "shape", device="cpu", workload=workload)


def test_what_cannot_be_compared_is_refused(embedded, files, pruned, checkpoint, tmp_path, monkeypatch) -> None:
    data = float32(files["task"])
    with pytest.raises(CheckpointError, match="another vocabulary"):
        evaluate(embedded, [checkpoint("mixtral")], data=data, options=QUICK)
    with pytest.raises(UsageError, match="are called"):
        evaluate(embedded, [pruned, pruned], data=data, options=QUICK)
    selection = json.loads((pruned / "shape" / "selection.json").read_text())
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({**selection, "fingerprint": "sha256:" + "0" * 64}))
    with pytest.raises(FingerprintError, match="another model"):
        evaluate(embedded, [foreign], data=data, options=QUICK)
    nameless = tmp_path / "nameless.json"  # as a table of values gives it
    layers = {**selection["layers"], "7": selection["layers"]["0"]}
    nameless.write_text(json.dumps({**selection, "fingerprint": None, "layers": layers}))
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="layer 7, which is not an MoE layer"):
        patch.setattr(session, "load_original", lambda *_: pytest.fail("the model was loaded"))
        evaluate(embedded, [nameless], data=data, options=QUICK)
    with pytest.raises(UsageError, match="give --trace TRACE"):
        mask = pruned / "shape" / "selection.json"
        evaluate(embedded, [mask], data=data, options=EvaluateOptions(**{**vars(QUICK), "faithfulness": 3}))
    with pytest.raises(UsageError, match="at least 3"):
        evaluate(embedded, [pruned], data=data, options=EvaluateOptions(**{**vars(QUICK), "faithfulness": 2}))


class Phases(Silent):
    """Remembers of every phase how much it announced and how much it did."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, int]] = {}

    @contextmanager
    def phase(self, title, total, unit):
        counts: list[int] = []
        yield counts.append
        self.seen[title] = (total, sum(counts))


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def loaded(*_args, **_options):
        raise AssertionError("a model was loaded")

    for module in ("evaluation_run", "session"):
        monkeypatch.setattr(f"shape_moe.jobs.{module}.load_original", loaded)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_tasks_that_cannot_be_run_are_refused_before_anything_is_loaded(embedded, files, tmp_path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    task = str(write_tasks(tmp_path / "tasks") / "choice.yaml")

    def refused(words: str, asked: TaskOptions, model=embedded) -> None:
        for data in (None, float32(files["task"])):
            with pytest.raises(UsageError, match=words):
                evaluate(model, [], data=data, options=EvaluateOptions(**{**vars(QUICK), "tasks": asked}))

    refused("There is no task 'embedded_chioce'", TaskOptions((task, "embedded_chioce")))
    refused("There is no file nowhere.yaml", TaskOptions(("nowhere.yaml",)))
    bare = shutil.copytree(embedded, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    refused("the tokenizer has none", TaskOptions((task,), chat_template=True), bare)
    monkeypatch.setattr(harness, "find_spec", lambda name: name == "lm_eval" or None)
    refused("vLLM is not installed", TaskOptions((task,), engine="vllm"))
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    refused("lm-evaluation-harness is not installed", TaskOptions((task,)))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_values_that_cannot_be_found_again_are_refused_before_anything_is_loaded(embedded, files, pruned) -> None:
    known = load_selection(pruned / "shape" / "selection.json")
    checked = {**vars(QUICK), "faithfulness": 3, "trace": str(pruned / "shape" / "trace")}
    for scorer in ("table", "somebodys"):
        selection = replace(known, scorer=scorer)
        with pytest.raises(UsageError, match=f"--faithfulness cannot value .*: There is no scorer '{scorer}'"):
            evaluate(embedded, [selection], data=float32(files["task"]), options=EvaluateOptions(**checked))


def test_faithfulness_takes_what_was_judged_before(embedded, files, pruned, monkeypatch) -> None:
    phases = Phases()
    options = EvaluateOptions(
        generation=None, footprint=None, faithfulness=3, trace=str(pruned / "shape" / "trace"), seed=1
    )
    selection = load_selection(pruned / "shape" / "selection.json")
    counted, runs = stopped_after(100, bench.compare_with_dense)
    monkeypatch.setattr(bench, "compare_with_dense", counted)
    result = evaluate(embedded, [pruned, selection], data=float32(files["task"]), options=options, progress=phases)
    checkpoint, mask = result.faithfulness
    assert mask.kept == result.models[2].sets["task"]
    assert checkpoint.kept == mask.kept
    assert checkpoint.random == mask.random
    steps = [counts for title, counts in phases.seen.items() if title.startswith("Faithfulness of ")]
    assert steps == [(5, 5), (5, 5)]
    assert len(runs) == 5 + 1  # the selection and its controls once for both, and the checkpoint


def test_classes_are_those_that_were_asked_for(embedded, files, pruned) -> None:
    data = DataOptions(str(files["task"]), stratify="task", samples=20)
    tracing = ExampleOptions(data, device="cpu", dtype="float32")
    plain = evaluate(embedded, [pruned], data=tracing, options=QUICK)
    assert plain.models[1].classes == {}
    assert plain.document["models"][1]["classes"] is None
    asked = evaluate(embedded, [pruned], data=tracing, options=EvaluateOptions(**{**vars(QUICK), "by": "task"}))
    found = asked.models[1]
    assert found.classes == {"sorting": {"quality": found.sets["task"].quality, "change": found.sets["task"].change}}
    assert asked.models[0].classes == {}


def test_task_changes_are_drawn_once_by_the_seed(embedded, pruned, tmp_path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    asked = TaskOptions((str(write_tasks(tmp_path / "tasks") / "addition.yaml"),), limit=20)
    seeds, original = [], task_changes

    def counted(result, dense, *, seed):
        seeds.append(seed)
        return original(result, dense, seed=seed)

    monkeypatch.setattr("shape_moe.jobs.evaluation_tasks.task_changes", counted)
    options = EvaluateOptions(footprint=None, tasks=asked, seed=5)
    result = evaluate(embedded, [pruned], options=options, device="cpu", dtype="float32")
    dense, found = result.models
    assert seeds == [5]
    assert found.task_changes == {
        "embedded_addition": original(found.tasks["embedded_addition"], dense.tasks["embedded_addition"], seed=5)
    }
    assert dense.task_changes is None
    change = result.document["models"][1]["task_changes"]["embedded_addition"]["exact_match"]
    values = [model.tasks["embedded_addition"].metrics["exact_match"].value for model in (dense, found)]
    assert change["value"] == pytest.approx(values[1] - values[0])
    assert result.document["models"][0]["task_changes"] is None


def test_items_that_differ_are_told_and_what_was_judged_is_kept(embedded, pruned, tmp_path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    asked = TaskOptions((str(write_tasks(tmp_path / "tasks") / "choice.yaml"),), limit=4)
    run = evaluation_run.run_tasks

    def other_items(model, *given, **options):
        hashes.append("")
        found = run(model, *given, **options)
        return {name: replace(result, item_hashes=(str(len(hashes)),) * 4) for name, result in found.items()}

    hashes: list[str] = []
    monkeypatch.setattr(evaluation_run, "run_tasks", other_items)
    options = EvaluateOptions(footprint=None, tasks=asked)
    result = evaluate(embedded, [pruned], options=options, device="cpu", dtype="float32")
    assert "not of the same items" in result.notes[0]
    assert result.models[1].task_changes == {}
    assert "acc" in result.document["models"][1]["tasks"]["embedded_choice"]
