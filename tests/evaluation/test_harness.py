"""Tasks of lm-evaluation-harness score a model as a plain loop over the model does; a mask scores as the checkpoint."""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from shape_moe.calibration.batches import RESPONSE, make_batch
from shape_moe.calibration.examples import Example
from shape_moe.demo.embedded import exact_match
from shape_moe.errors import DataError, ShapeMoeError, UsageError
from shape_moe.evaluation import harness
from shape_moe.evaluation.harness import TaskOptions, check_tasks, run_tasks, run_tasks_with_vllm
from shape_moe.evaluation.task_results import paired_difference
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.pruning.masks import masked
from support.harness_tasks import COUNT, addition_rows, choice_rows, write_tasks
from support.selections import seven_of_eight

pytest.importorskip("lm_eval")
ADDITION, CHOICE = "embedded_addition", "embedded_choice"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(embedded_model):
    return embedded_model[0]


@pytest.fixture(scope="module")
def tokenizer(embedded_model):
    return embedded_model[1]


@pytest.fixture(scope="module")
def both(folder) -> tuple[str, str]:
    return str(folder / "addition.yaml"), str(folder / "choice.yaml")


@pytest.fixture(scope="module")
def dense(model, tokenizer, both):
    return run_tasks(model, tokenizer, TaskOptions(both), batch_size=50)


@pytest.fixture(scope="module")
def under_mask(model, tokenizer, both):
    with masked(model, seven_of_eight()):
        return run_tasks(model, tokenizer, TaskOptions(both), batch_size=50)


def generated_right(model, tokenizer) -> list[bool]:
    """Plain generation without lm-eval; all prompts are of one length, so there is no padding."""
    rows = addition_rows()
    prompts = torch.tensor([tokenizer(row["prompt"]).input_ids for row in rows])
    answers = model.generate(prompts, max_new_tokens=64, do_sample=False)[:, prompts.shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [text.split("\n")[0] == row["response"] for text, row in zip(texts, rows, strict=True)]


def chosen_right(model, tokenizer) -> list[bool]:
    """The choice of the highest log-likelihood, without lm-eval."""
    rows = choice_rows()
    examples = []
    for row in rows:
        prompt = tuple(tokenizer(row["prompt"]).input_ids)
        for choice in row["choices"]:
            answer = tokenizer(choice, add_special_tokens=False).input_ids
            examples.append(Example.answered(len(examples), "", (*prompt, *answer), len(prompt)))
    batch = make_batch(examples, range(len(examples)), pad_id=0)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].log_softmax(-1)
    answered = batch.segments.view(batch.input_ids.shape)[:, 1:] == RESPONSE
    sums = (logits.gather(2, batch.input_ids[:, 1:, None])[..., 0] * answered).sum(1)
    return [int(best) == row["gold"] for best, row in zip(sums.view(len(rows), -1).argmax(1), rows, strict=True)]


def test_scores_are_those_of_a_plain_loop(model, tokenizer, dense, under_mask) -> None:
    for result, selection in ((dense, None), (under_mask, seven_of_eight())):
        with masked(model, selection) if selection else not_masked():
            assert result[ADDITION].scores["exact_match"] == tuple(map(float, generated_right(model, tokenizer)))
            assert result[CHOICE].scores["acc"] == tuple(map(float, chosen_right(model, tokenizer)))
            expected = exact_match(model, tokenizer, ["addition"], count=COUNT)["addition"]
        assert result[ADDITION].metrics["exact_match"].value == pytest.approx(expected, abs=1e-12)
    assert 0 < under_mask[ADDITION].metrics["exact_match"].value < 1
    assert 0 < under_mask[CHOICE].metrics["acc"].value <= 1


@contextmanager
def not_masked():
    yield


def test_a_mask_scores_as_the_checkpoint_that_is_written(tmp_path, embedded, tokenizer, both, under_mask) -> None:
    prune(embedded, tmp_path / "out", PruneOptions(device="cpu", check_logits=False), selection=seven_of_eight())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert run_tasks(written, tokenizer, TaskOptions(both), batch_size=50) == under_mask


def test_intervals_and_provenance(dense, under_mask) -> None:
    for result in (*dense.values(), *under_mask.values()):
        for name, estimate in result.metrics.items():
            scores = np.array(result.scores[name])
            error = scores.std(ddof=1) / np.sqrt(COUNT)
            assert estimate.value == pytest.approx(scores.mean())
            assert (estimate.low, estimate.high) == pytest.approx(
                (scores.mean() - 1.96 * error, scores.mean() + 1.96 * error)
            )
            assert result.to_document()[name] == {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        assert result.items == len(result.item_hashes) == COUNT
        assert result.lm_eval_version.startswith("0.4.")
    assert (dense[ADDITION].task_version, dense[ADDITION].num_fewshot) == ("1.5", 0)
    assert dense[CHOICE].task_version is None
    assert dense[ADDITION].task_hash == under_mask[ADDITION].task_hash != dense[CHOICE].task_hash


def test_the_paired_difference_is_of_the_same_items(dense, under_mask) -> None:
    difference = paired_difference(dense[ADDITION], under_mask[ADDITION], "exact_match", seed=1)
    values = [result[ADDITION].metrics["exact_match"] for result in (dense, under_mask)]
    assert difference.value == pytest.approx(values[1].value - values[0].value)
    assert difference.low < difference.value < difference.high < 0
    pairs = np.subtract(under_mask[ADDITION].scores["exact_match"], dense[ADDITION].scores["exact_match"])
    reach = 1.96 * pairs.std(ddof=1) / np.sqrt(COUNT)
    assert (difference.high - difference.low) / 2 == pytest.approx(reach, rel=0.15)
    same = paired_difference(dense[ADDITION], dense[ADDITION], "exact_match", seed=1)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_pairs_say_more_than_two_separate_intervals(dense) -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=COUNT)

    def scored(values):
        return replace(dense[ADDITION], scores={"score": tuple(values)})

    pair = scored(base), scored(base + 0.1 + 0.01 * rng.normal(size=COUNT))
    difference = paired_difference(*pair, "score", seed=1)
    changes = np.subtract(pair[1].scores["score"], pair[0].scores["score"])
    reach = 1.96 * changes.std(ddof=1) / np.sqrt(COUNT)
    assert difference.value == pytest.approx(changes.mean())
    assert (difference.low, difference.high) == pytest.approx(
        (changes.mean() - reach, changes.mean() + reach), abs=2e-4
    )
    assert paired_difference(*pair, "score", seed=1) == difference != paired_difference(*pair, "score", seed=2)
    assert paired_difference(*pair[::-1], "score", seed=1).value == -difference.value


def test_what_cannot_be_paired_is_refused(model, tokenizer, folder, dense) -> None:
    fewer = run_tasks(model, tokenizer, TaskOptions((str(folder / "addition.yaml"),), limit=10), batch_size=50)
    assert fewer[ADDITION].items == 10
    with pytest.raises(UsageError, match=r"not of the same items \(100 and 10, 10 of them in common\)"):
        paired_difference(dense[ADDITION], fewer[ADDITION], "exact_match", seed=0)
    with pytest.raises(UsageError, match="cannot be compared with task"):
        paired_difference(dense[ADDITION], dense[CHOICE], "acc", seed=0)
    with pytest.raises(UsageError, match="no score per item for 'f1'; it has them for exact_match"):
        paired_difference(dense[ADDITION], dense[ADDITION], "f1", seed=0)


def test_few_shot_examples_are_part_of_an_item(tmp_path, model, tokenizer, dense) -> None:
    path = write_tasks(tmp_path / "tasks") / "addition.yaml"
    path.write_text(path.read_text() + 'fewshot_split: test\ntarget_delimiter: ""\n')
    options = TaskOptions((str(path),), limit=20, num_fewshot=2)
    runs = [run_tasks(model, tokenizer, options, batch_size=50, seed=seed)[ADDITION] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].num_fewshot == 2
    assert not set(runs[0].item_hashes) & set(dense[ADDITION].item_hashes)
    assert set(runs[0].item_hashes) != set(runs[2].item_hashes)


def test_names_tags_and_groups(model, tokenizer, folder, both, dense) -> None:
    def short(*tasks: str):
        return run_tasks(model, tokenizer, TaskOptions(tasks, limit=10), batch_size=50)

    file = str(folder / "choice.yaml")
    assert list(short(file)) == [CHOICE]
    assert set(short(file, "embedded_addition")) == {CHOICE, ADDITION}
    assert set(short(file, "embedded_tag")) == {CHOICE, ADDITION}
    group = short(str(folder / "group.yaml"))
    assert set(group) == {CHOICE, ADDITION, "embedded_group"}
    assert group["embedded_group"].metrics["acc"] == group[CHOICE].metrics["acc"]
    with pytest.raises(UsageError, match="kept without its items"):
        paired_difference(group["embedded_group"], group["embedded_group"], "acc", seed=0)


def test_the_task_says_how_much_is_generated(tmp_path, model, tokenizer) -> None:
    assert model.generation_config.max_new_tokens == 64
    path = write_tasks(tmp_path / "tasks", longest=2) / "addition.yaml"
    result = run_tasks(model, tokenizer, TaskOptions((str(path),), limit=10), batch_size=50)
    assert result[ADDITION].metrics["exact_match"].value == 0  # sums have three digits at least
    assert model.generation_config.max_new_tokens == 64


def test_an_offloaded_model_scores_as_one_in_memory(embedded, model, tokenizer, both) -> None:
    offloaded = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    few = TaskOptions(both, limit=6)
    assert run_tasks(offloaded, tokenizer, few, batch_size=50) == run_tasks(model, tokenizer, few, batch_size=50)


def random_states() -> list:
    legacy = np.random.get_state()  # noqa: NPY002  # what lm-eval's tasks draw from
    return [random.getstate(), legacy[1].tolist(), torch.get_rng_state().tolist()]


def test_nothing_is_printed_or_changed(tmp_path, model, tokenizer, capfd) -> None:
    folder = write_tasks(tmp_path / "tasks")
    state = random_states()
    settings, padding = model.generation_config, tokenizer.pad_token
    phases = []

    class Recorder:
        @contextmanager
        def phase(self, title, total, unit):
            counts = []
            yield counts.append
            phases.append((title, total, sum(counts)))

    copied = copy.deepcopy(tokenizer)
    copied.pad_token = None
    model.train()
    few = TaskOptions((str(folder / "addition.yaml"), str(folder / "choice.yaml")), limit=8)
    without = run_tasks(model, copied, few, batch_size=50, progress=Recorder())
    assert model.training
    model.eval()
    assert without == run_tasks(model, tokenizer, few, batch_size=50)
    assert (model.generation_config, tokenizer.pad_token, copied.pad_token) == (settings, padding, None)
    assert random_states() == state
    assert phases == [("Running generate until requests", 8, 8), ("Running loglikelihood requests", 32, 32)]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "it/s" not in captured.err
    assert "examples/s" not in captured.err


def test_a_chat_template_is_applied_when_asked_for(model, tokenizer, folder, dense) -> None:
    plainly = TaskOptions((str(folder / "addition.yaml"),), limit=10)
    through_it = replace(plainly, chat_template=True)
    chatty, bare = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for message in messages %}chat: {{ message['content'] }}{% endfor %}"
    bare.chat_template = None
    plain = run_tasks(model, chatty, plainly, batch_size=50)[ADDITION]
    assert plain.item_hashes == dense[ADDITION].item_hashes[:10]
    templated = run_tasks(model, chatty, through_it, batch_size=50)[ADDITION]
    assert not set(templated.item_hashes) & set(plain.item_hashes)
    with pytest.raises(UsageError, match="the tokenizer has none"):
        run_tasks(model, bare, through_it, batch_size=50)


BROKEN = {
    "task: a\noutput_type: [": "cannot be used",
    "task: a\noutput_type: no_such_type\ndataset_path: json": "cannot be used",
    "task: a\ndataset_path: nobody/no-such-set\ntest_split: test\noutput_type: generate_until": "could not be loaded",
    "task: a\ntest_split: test\nclass: !function nowhere.Task": "cannot be used|not installed",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_definitions_are_named(tmp_path, model, tokenizer, text) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ShapeMoeError, match=BROKEN[text]) as caught:
        run_tasks(model, tokenizer, TaskOptions((str(path),)), batch_size=1)
    assert isinstance(caught.value, DataError if "no-such-set" in text else UsageError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_sentence(tmp_path, model, tokenizer, folder, monkeypatch) -> None:
    def refused(error, words, tasks, **options) -> None:
        with pytest.raises(error, match=words):
            run_tasks(model, tokenizer, TaskOptions(tuple(tasks), **options), batch_size=1)

    file = str(folder / "addition.yaml")
    refused(UsageError, "Name at least one task", [])
    refused(UsageError, "There is no file nowhere.yaml", ["nowhere.yaml"])
    refused(UsageError, "limit must be at least 1", [file], limit=0)
    refused(UsageError, "num-fewshot must be at least 0", [file], num_fewshot=-1)
    refused(
        UsageError, "There is no task 'embedded_additon'; did you mean embedded_addition", [file, "embedded_additon"]
    )
    refused(UsageError, "There is no task 'gsm8kk'; did you mean .*gsm8k", ["gsm8kk"])
    refused(DataError, "The data of task gsm8k could not be loaded.*Without a network", ["gsm8k"])
    unsafe = tmp_path / "unsafe.yaml"
    unsafe.write_text((folder / "addition.yaml").read_text() + "\nunsafe_code: true\n")
    refused(UsageError, "executes code that the model writes", [str(unsafe)])
    long = write_tasks(tmp_path / "long", longest=4096) / "addition.yaml"
    refused(ShapeMoeError, "lm-eval could not run embedded_addition: .*4096", [str(long)])
    with pytest.raises(UsageError, match="engine argument seed is decided by this run"):
        run_tasks_with_vllm("model", TaskOptions((file,), engine="vllm", engine_args={"seed": 1}))
    with pytest.raises(UsageError, match="engine argument hf_overrides is decided"):
        overriding = TaskOptions((file,), engine="vllm", engine_args={"hf_overrides": {}})
        run_tasks_with_vllm("model", overriding, selection="s.json")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    refused(UsageError, r"lm-evaluation-harness is not installed: pip install lm-eval", [file])
    monkeypatch.setattr(harness, "find_spec", lambda name: name == "lm_eval" or None)
    with pytest.raises(UsageError, match=r"vLLM is not installed: pip install vllm==0.32.0"):
        run_tasks_with_vllm("model", TaskOptions((file,), engine="vllm"))


def test_tasks_are_looked_up_without_their_data(folder, monkeypatch, capfd) -> None:
    """Names, tags and files that exist pass, though gsm8k's data cannot be loaded here; nothing is printed."""
    file = str(folder / "choice.yaml")
    check_tasks(["gsm8k", file, str(folder / "group.yaml"), "embedded_addition", "embedded_tag"])
    assert capfd.readouterr().out == ""
    with pytest.raises(UsageError, match="There is no task 'gsm8kk'; did you mean .*gsm8k"):
        check_tasks([file, "gsm8kk"])
    with pytest.raises(UsageError, match="There is no file nowhere.yaml"):
        check_tasks([file, "nowhere.yaml"])
    monkeypatch.setattr(harness, "find_spec", lambda name: name == "lm_eval" or None)
    check_tasks([file])
    with pytest.raises(UsageError, match=r"vLLM is not installed: pip install vllm==0.32.0"):
        check_tasks([file], "vllm")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"lm-evaluation-harness is not installed: pip install lm-eval"):
        check_tasks([file])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ()}, "Name at least one task"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"num_fewshot": -1}, "num-fewshot must be at least 0, not -1"),
        ({"engine": "sglang"}, "There is no engine 'sglang'; there are transformers and vllm"),
        ({"engine_args": {"dtype": "float32"}}, "Engine arguments go with --engine vllm"),
        ({"engine": "vllm", "engine_args": {"model": "m"}}, "engine argument model is decided by this run"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options, words) -> None:
    with pytest.raises(UsageError, match=words):
        TaskOptions(**{"names": ("gsm8k",), **options})
