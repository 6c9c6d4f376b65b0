"""Verdicts from end to end, on the embedded model."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import pytest

import shape_moe
from shape_moe.calibration.examples import TokenOptions
from shape_moe.calibration.records import DataOptions
from shape_moe.cli.main import run
from shape_moe.demo.tasks import examples
from shape_moe.evaluation import questions, tool_check
from shape_moe.evaluation.forgotten import general_records
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.verdict import Verdict, Word
from shape_moe.jobs.evaluate import evaluate
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.trace import trace
from shape_moe.selection.method import Method
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace
from support.data import write_lines

QUICK = EvaluateOptions(generation=GenerationOptions(examples=16), footprint=None, general=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = {"calibration": (32, False), "few": (10, True), "many": (200, True)}
    return {
        name: write_lines(folder / f"{name}.jsonl", examples("sorting", count, seed=1, held_out=held_out))
        for name, (count, held_out) in rows.items()
    }


@pytest.fixture(scope="module")
def traced(embedded, files) -> Trace:
    return trace(embedded, ExampleOptions(DataOptions(str(files["calibration"])), device="cpu"))


@pytest.fixture(scope="module")
def fine(traced) -> Selection:
    """A selection that has lost nothing of the task."""
    return select_from_trace(traced, SelectOptions(0.9, Method("reap")))


@pytest.fixture(scope="module")
def broken(fine) -> Selection:
    """One that keeps four experts of every layer, whichever they are."""
    return replace(fine, layers={layer: [0, 1, 2, 3] for layer in fine.layers})


def judge(embedded, given, file, tokens=None, **options):
    made = replace(QUICK, **options)
    data = ExampleOptions(DataOptions(str(file)), tokens or TokenOptions(), device="cpu", dtype="float32")
    return evaluate(embedded, [given], data=data, options=made)


def test_a_fine_model_is_safe_with_enough_examples_alone(embedded, fine, files) -> None:
    many = judge(embedded, fine, files["many"]).models[1].verdict
    assert many.word is Word.SAFE
    assert [fall.figure for fall in many.falls] == ["exact match"]
    few = judge(embedded, fine, files["few"]).models[1].verdict
    assert few.word is Word.NO_LOSS
    assert few.reason == "10 examples: a loss of up to 28 % is not excluded; 189 without a loss would show 2 %."
    unheard = judge(embedded, fine, files["many"], generation=None).models[1].verdict
    assert unheard.word is Word.NO_LOSS  # likelihood alone


def test_a_broken_model_is_damaged(embedded, broken, files) -> None:
    result = judge(embedded, broken, files["few"])
    found = result.models[1].verdict
    assert found.word is Word.DAMAGED
    assert found.advice
    document = json.loads(json.dumps(result.document))["models"][1]["verdict"]
    assert document["verdict"] == "damaged"
    assert Verdict.from_document(document) == found


def test_examples_that_calibration_has_seen_do_not_count(embedded, traced, fine, files, tmp_path) -> None:
    traced.save(tmp_path / "trace")
    seen = judge(embedded, fine, files["calibration"], trace=str(tmp_path / "trace")).models[1].verdict
    assert seen.word is Word.NOT_MEASURED
    assert seen.reason == "The model was made from all of the 32 examples."
    both = [*examples("sorting", 32, seed=1), *examples("sorting", 10, seed=1, held_out=True)]
    mixed = judge(embedded, fine, write_lines(tmp_path / "both.jsonl", both), trace=str(tmp_path / "trace"))
    assert mixed.models[1].verdict.outcomes[0].examples == 10
    assert "32 of 42 examples do not count, because the model was made from them." in mixed.models[1].verdict.notes


def test_the_class_that_was_lost_is_named(embedded, fine, tmp_path) -> None:
    rows = [row for task in ("sorting", "lookup") for row in examples(task, 24, seed=3, held_out=True)]
    cut = replace(fine, layers={layer: kept[: len(kept) // 2] for layer, kept in fine.layers.items()})
    file = write_lines(tmp_path / "both.jsonl", rows)
    found = judge(embedded, cut, file, by="task", generation=None).models[1].verdict
    assert found.word is Word.DAMAGED
    assert {fall.name for fall in found.falls} == {"sorting", "lookup"}
    assert f" in {found.falls[0].name} falls from" in found.reason


def test_complaints_of_any_set_rise_to_the_top(embedded, broken, files) -> None:
    other = files["few"].with_name("others.jsonl")
    other.write_bytes(files["few"].read_bytes())
    result = judge(embedded, broken, files["few"], also=DataOptions(str(other)))
    task, also = (result.models[1].sets[name].health.complaints for name in ("task", "also"))
    assert task == also
    for complaint in task:
        assert sum(complaint in warning for warning in result.document["warnings"]) == 2


def test_the_command_opens_with_the_verdict(embedded, broken, files, tmp_path, capsys) -> None:
    broken.save(tmp_path / "broken.json")
    arguments = ["evaluate", str(embedded), str(tmp_path / "broken.json"), "--data", str(files["few"])]
    arguments += ["--device", "cpu", "--generate", "8", "--no-footprint", "--no-general"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(out) < 10_000  # no line is filled up to the width of a pipe
    assert lines[0] == (
        "broken (4 layers of 32 experts): 81 % smaller, from 6.47 MiB to 1.22 MiB; 12 % of the experts kept by "
        "reap/coverage, drop."
    )
    assert lines[1].startswith("  Verdict: damaged. ")
    assert run([*arguments, "--json", "--max-drop", "1%"]) == 0
    verdict = json.loads(capsys.readouterr().out)["models"][1]["verdict"]
    assert verdict["max_drop"] == 0.01
    assert run([*arguments, "--max-drop", "120%"]) == 2
    assert "--max-drop" in capsys.readouterr().err


def test_what_was_forgotten_is_shown_beside_the_verdict(embedded, broken, files, monkeypatch) -> None:
    records = general_records(["arithmetic"])[:6]
    monkeypatch.setattr(questions, "general_records", lambda: records)
    found = judge(embedded, broken, files["few"], general=True).models[1]
    assert [(group.name, group.prompts) for group in found.forgotten.groups] == [("arithmetic", 6)]
    assert found.forgotten.groups[0].kl > 0.1


@pytest.fixture
def few_prompts(monkeypatch):
    """Six general prompts instead of two hundred."""
    records = general_records(["arithmetic"])[:6]
    monkeypatch.setattr(questions, "general_records", lambda: records)


def test_prune_ends_with_the_judgement(embedded, tmp_path, few_prompts) -> None:
    file = write_lines(tmp_path / "sorting.jsonl", examples("sorting", 60, seed=1))
    found = prune(embedded, tmp_path / "out", PruneOptions(SelectOptions(0.8), device="cpu"), data=file)
    verdict = found.judgement.verdict
    assert verdict.word is Word.NO_LOSS
    assert [outcome.examples for outcome in verdict.outcomes] == [35]  # those that 25 samples left
    assert found.judgement.forgotten.groups[0].prompts == 6
    card = (found.path / "README.md").read_text(encoding="utf-8")
    said = [*found.opening.lines(), *found.judgement.lines()]
    assert said[0].startswith("Method: shape/coverage, drop, ragged, 25 calibration examples (the published SHAPE")
    assert "(4 layers of 32 experts): 19 % smaller" in said[1]
    for line in said:
        assert line in card
    page = shape_moe.report(found.path, tmp_path / "r.html", model=embedded).path.read_text(encoding="utf-8")
    page = html.unescape(page[: page.index("plotly.js v")])
    for line in (*said[:2], verdict.reason, verdict.advice):
        assert line in page
    assert found.following == (
        f"shape-moe evaluate {embedded} {found.path} --data HELD_OUT.jsonl -o evaluation.json",
        f"shape-moe report {found.path} -o report.html",
    )
    written = json.loads((found.path / "shape" / "judgement.json").read_text(encoding="utf-8"))
    assert Verdict.from_document(written) == verdict
    same = judge(embedded, found.path, write_lines(tmp_path / "again.jsonl", examples("sorting", 60, seed=1)))
    again = same.models[1].verdict
    assert again.outcomes[0].exact == verdict.outcomes[0].exact


def test_the_published_sample_is_never_given_up(embedded, tmp_path) -> None:
    file = write_lines(tmp_path / "sorting.jsonl", examples("sorting", 26, seed=1))
    found = prune(embedded, tmp_path / "out", PruneOptions(SelectOptions(0.8), device="cpu"), data=file)
    assert found.judgement.verdict.word is Word.NOT_MEASURED
    assert "the data holds only 1 other prompt" in found.judgement.verdict.reason
    without = PruneOptions(SelectOptions(0.8), device="cpu", judgement=None)
    plain = prune(embedded, tmp_path / "plain", without, data=file)
    assert plain.judgement is None
    assert plain.selection.layers == found.selection.layers


def test_a_model_that_is_not_good_enough_is_rejected(embedded, tmp_path, few_prompts, capsys) -> None:
    file, out = write_lines(tmp_path / "sorting.jsonl", examples("sorting", 45, seed=1)), tmp_path / "out"
    arguments = ["prune", str(embedded), "--data", str(file), "-o", str(out), "--device", "cpu", "--json"]
    arguments += ["--preset", "paper"]
    assert run([*arguments, "--keep", "0.2", "--require", "no-loss"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["rejected"]
    assert document["judgement"]["verdict"] == "damaged"
    assert not out.exists()
    assert (tmp_path / "out.rejected" / "config.json").is_file()
    assert run([*arguments, "--keep", "0.8", "--require", "no-loss"]) == 2  # what was rejected is not overwritten
    assert "out.rejected" in capsys.readouterr().err
    assert run([*arguments, "--keep", "0.8", "--require", "no-loss", "--force"]) == 0
    assert out.is_dir()
    assert run([*arguments, "--keep", "0.8", "--force", "--require", "safe", "--no-judge"]) == 2
    assert run([*arguments, "--keep", "0.8", "--force", "--require", "perfect"]) == 2
    assert "--require takes safe or no-loss" in capsys.readouterr().err


def test_general_prompts_and_long_judging_can_be_left_out(embedded, tmp_path, few_prompts, capsys) -> None:
    file = write_lines(tmp_path / "sorting.jsonl", examples("sorting", 45, seed=1))
    arguments = ["prune", str(embedded), "--data", str(file), "--device", "cpu", "--keep", "0.8", "--json"]
    arguments += ["--preset", "paper"]
    assert run([*arguments, "-o", str(tmp_path / "out"), "--no-general", "--no-logits"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["judgement"]["forgotten"] is None
    assert "Judging the dense and the pruned model: 20 examples and up to 20 free answers; this takes about" in said.err
    for idle in (("--no-general",), ("--judge-minutes", "9"), ("--judge-minutes", "0")):
        assert run([*arguments, "-o", str(tmp_path / "other"), *idle, *(["--no-judge"] * (idle[-1] != "0"))]) == 2
        assert idle[0] in capsys.readouterr().err


TOOL = {"type": "function", "function": {"name": "sort", "parameters": {"type": "object", "required": ["digits"]}}}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for turn in messages %}{{ turn.content or '' }}"
    "{% for call in turn.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>\n{% endfor %}"
    "{% endfor %}"
)
"""Writes conversations as the embedded model knows tasks, with tools and their calls beside them."""
CALL = '<tool_call>{"name": "sort", "arguments": {"digits": "%s"}}</tool_call>'


@pytest.fixture
def scripted_calls(monkeypatch):
    """Where tools are offered, the dense model calls one as the data does; one that lacks experts answers by words."""

    def answer(model, asked, room, **_):
        masked = any(module._forward_pre_hooks for module in model.modules())
        for key, prompt in asked.items():
            digits = bytes(prompt).decode().rpartition("sort ")[2].rstrip("=")
            yield {key: list(b"I sort no more." if masked else (CALL % digits).encode())}

    monkeypatch.setattr(tool_check, "greedy_answers", answer)


def test_three_models_that_are_not_safe_get_three_verdicts(
    embedded, fine, broken, files, tmp_path, scripted_calls
) -> None:
    """One that loops, one that answers well and calls no tools any more, and one that is judged on ten examples."""
    looping = judge(embedded, broken, files["few"]).models[1].verdict
    few = judge(embedded, fine, files["few"]).models[1].verdict
    rows = examples("sorting", 140, seed=1, held_out=True)
    talk = [conversation(row) for row in rows[:120]] + [conversation(row, calling=True) for row in rows[120:]]
    file = write_lines(tmp_path / "tools.jsonl", talk)
    silent = judge(embedded, fine, file, tokens=TokenOptions(chat_template=TEMPLATE)).models[1].verdict
    assert [looping.word, silent.word, few.word] == [Word.DAMAGED, Word.LOSS, Word.NO_LOSS]
    assert silent.reason.startswith("It calls no tools any more. Right tool calls fall from 100 % to 0 %")
    assert silent.outcomes[0].exact.count == 120
    assert silent.outcomes[0].calls["valid"].shares == (1.0, 0.0)


def conversation(row, *, calling: bool = False):
    """An example of a task as a conversation, whose answer is a call of a function where it shall be."""
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    if calling:
        digits = row["prompt"].partition("sort ")[2].rstrip("=")
        call = {"type": "function", "function": {"name": "sort", "arguments": {"digits": digits}}}
        turns[1] |= {"content": "", "tool_calls": [call]}
    return {"messages": turns, "tools": [TOOL]} if calling else {"messages": turns}
