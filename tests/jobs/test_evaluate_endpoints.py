"""The verdict over servers: equal to what the same models say in this process, wherever it must be."""

from __future__ import annotations

import json
from contextlib import ExitStack

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from shape_moe.calibration.records import DataOptions, Record
from shape_moe.demo.tasks import examples
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.evaluated import Evaluation
from shape_moe.evaluation.generation import GenerationOptions
from shape_moe.evaluation.served_answers import ServedModel
from shape_moe.jobs.evaluate import evaluate
from shape_moe.jobs.evaluate_endpoints import EndpointOptions, evaluate_endpoints
from shape_moe.jobs.evaluate_options import EvaluateOptions
from shape_moe.jobs.trace import trace
from shape_moe.openai_server import OpenAIServer
from shape_moe.pruning.masks import masked
from shape_moe.selection.select import SelectOptions, select_from_trace
from shape_moe.units import kl_at_least
from support.chat_server import ChatModel, greedy_steps, serving
from support.data import write_lines

ROOM = 24
OPTIONS = EndpointOptions(general=False, max_new_tokens=ROOM, at_a_time=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [*examples("sorting", 6, seed=3), *examples("addition", 6, seed=4)]
    return write_lines(tmp_path_factory.mktemp("served") / "held-out.jsonl", rows)


@pytest.fixture(scope="module")
def selection(embedded, tmp_path_factory):
    file = write_lines(tmp_path_factory.mktemp("traced") / "sorting.jsonl", examples("sorting", 12, seed=1))
    return select_from_trace(trace(embedded, file), SelectOptions(keep=0.3))


@pytest.fixture(scope="module")
def pruned_model(embedded, selection):
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype="float32").eval()
    with masked(model, selection) as found:
        yield found


@pytest.fixture
def both(embedded_model, pruned_model):
    """Dense and pruned behind servers."""
    model, tokenizer = embedded_model
    with ExitStack() as stack:
        sides = {"dense": ChatModel(model, tokenizer), "pruned": ChatModel(pruned_model, tokenizer, names_end=False)}
        yield {name: stack.enter_context(serving(side.reply)) for name, side in sides.items()}, sides


def outcomes_of(result: Evaluation):
    return {outcome.name: outcome for outcome in result.models[1].verdict.outcomes}


def test_figures_are_those_of_the_models_in_this_process(both, embedded, selection, data) -> None:
    served = evaluate_endpoints(both[0], data, EndpointOptions(by="task", general=False, max_new_tokens=ROOM))
    options = EvaluateOptions(
        by="task", generation=GenerationOptions(12, max_new_tokens=ROOM), footprint=None, general=False
    )
    here = outcomes_of(evaluate(embedded, [selection], data=str(data), options=options, dtype="float32"))
    there = outcomes_of(served)
    assert here.keys() == there.keys() == {"addition", "sorting"}
    for name in here:
        assert there[name].exact == here[name].exact
        assert there[name].answers == here[name].answers
    assert there["addition"].exact.lost > 0  # the selection was made for sorting
    assert [model.name for model in served.models] == ["dense", "pruned"]
    assert Evaluation.from_document(json.loads(json.dumps(served.to_document()))).models[1].verdict is not None


@pytest.mark.parametrize("top", [3, 258])
def test_kl_is_a_lower_bound_and_exact_where_every_token_is_named(
    both, embedded_model, pruned_model, data, top
) -> None:
    model, tokenizer = embedded_model
    records = [json.loads(line) for line in data.read_text().splitlines()]
    total = steps = agreed = hidden = 0
    for record in records:
        tokens = list(tokenizer(record["prompt"], add_special_tokens=False).input_ids)
        _, theirs, _ = greedy_steps(model, tokens, ROOM)
        pruned, ours, _ = greedy_steps(pruned_model, tokens, ROOM)
        for place, (p, q) in enumerate(zip(theirs, ours, strict=False)):
            steps += 1
            agreed += int(p.argmax() == q.argmax())
            if place < len(pruned):  # this server does not name what ends an answer
                total += float((p.double().exp() * (p.double() - q.double())).sum())
                hidden += 1 - float(p.double().exp().topk(min(top, len(p))).values.sum())
            if int(p.argmax()) != int(q.argmax()):
                break
    together = DataOptions(str(data), label="")
    served = evaluate_endpoints(
        both[0], together, EndpointOptions(general=False, max_new_tokens=ROOM, top_logprobs=top)
    )
    (outcome,) = served.models[1].verdict.outcomes
    assert outcome.agreement.share == pytest.approx(1 - agreed / steps)
    with OpenAIServer(both[0]["dense"]) as one, OpenAIServer(both[0]["pruned"]) as other:
        from shape_moe.evaluation.served_comparison import ask_all

        models = [ServedModel(one, "m", top), ServedModel(other, "m", top)]
        found = [ask_all(models, Record(0, "here", prompt=r["prompt"]), ROOM)[1] for r in records]
    measured = sum(answer.kl for answer in found)
    assert measured <= total * (1 + 1e-4)
    assert (measured == pytest.approx(total, rel=1e-3)) is (top == 258)
    tokens = sum(answer.measured for answer in found)
    assert outcome.kl == pytest.approx(measured / tokens)
    assert outcome.kl_is_bound
    lines = served.models[1].verdict.lines()
    note = next(line for line in lines if line.startswith("KL is a lower bound"))
    assert f"the {top} most likely tokens of both models" in note
    assert f"at {tokens} tokens" in note
    assert sum(answer.unnamed for answer in found) == pytest.approx(hidden, rel=1e-3, abs=1e-4)
    assert any(f"KL {kl_at_least(outcome.kl)}" in line for line in lines)


def test_general_prompts_are_asked_too(both, data, monkeypatch) -> None:
    from shape_moe.evaluation import forgotten

    few = forgotten.general_records(["arithmetic"])[:3]
    monkeypatch.setattr(forgotten, "general_records", lambda: few)
    monkeypatch.setattr(forgotten, "ANSWER_TOKENS", 20)
    result = evaluate_endpoints(both[0], data, EndpointOptions(max_new_tokens=ROOM))
    (group,) = result.models[1].forgotten.groups
    assert (group.name, group.prompts) == ("arithmetic", 3)
    assert group.kl > 0


def test_an_interrupted_run_goes_on(both, data, tmp_path) -> None:
    endpoints, sides = both
    journal = tmp_path / "answers.jsonl"
    whole = evaluate_endpoints(endpoints, data, OPTIONS, journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 12
    journal.write_text("".join(lines[:7]) + lines[7][:40])
    sides["pruned"].asked.clear()
    again = evaluate_endpoints(endpoints, data, OPTIONS, journal=journal)
    assert len(sides["pruned"].asked) == 5
    assert again.models[1].verdict == whole.models[1].verdict
    evaluate_endpoints(endpoints, data, EndpointOptions(general=False, max_new_tokens=ROOM - 1), journal=journal)
    assert len(sides["pruned"].asked) == 5 + 12  # other questions are other work


def test_what_cannot_be_judged_is_said_in_one_sentence(both, data, embedded_model) -> None:
    endpoints, _ = both
    with pytest.raises(UsageError, match="two endpoints at least"):
        evaluate_endpoints({"dense": endpoints["dense"]}, data)
    with pytest.raises(UsageError, match="are the same model 'm'"):
        evaluate_endpoints({"dense": endpoints["dense"], "pruned": endpoints["dense"]}, data)
    with pytest.raises(UsageError, match="names 'other'"):
        evaluate_endpoints(endpoints, data, EndpointOptions(models={"other": "m"}))
    with pytest.raises(ShapeMoeError, match="did not answer"):
        evaluate_endpoints({**endpoints, "pruned": "http://127.0.0.1:9/v1"}, data)
    model, tokenizer = embedded_model
    for change, words in (
        ({"no_logprobs": True}, "gives no log-probabilities"),
        ({"refuse": "top_logprobs must be at most 5"}, "at most 5.*--top-logprobs N asks for fewer than 20"),
        ({"refuse": "temperature 0 is not allowed"}, "refused with status 400.*temperature"),
    ):
        with (
            serving(ChatModel(model, tokenizer, **change).reply) as url,
            pytest.raises(ShapeMoeError, match=words) as error,
        ):
            evaluate_endpoints({**endpoints, "pruned": url}, data, OPTIONS)
        assert "\n" not in str(error.value)


def test_raw_prompts_go_to_plain_completions(both, data) -> None:
    from shape_moe.calibration.examples import TokenOptions
    from shape_moe.calibration.records import DataOptions
    from shape_moe.jobs.session import ExampleOptions

    raw = ExampleOptions(DataOptions(str(data)), TokenOptions(template=False))
    one, other = (evaluate_endpoints(both[0], read, OPTIONS).models[1].verdict for read in (raw, str(data)))
    assert both[1]["dense"].asked[0]["prompt"]
    assert [o.exact for o in one.outcomes] == [o.exact for o in other.outcomes]
    assert np.isclose(one.outcomes[0].kl, other.outcomes[0].kl, rtol=1e-4)
