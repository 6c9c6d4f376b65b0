"""Verdicts over servers that answer by a script: what the command says, and every way in which a server can fail."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import pytest

from shape_moe import openai_server
from shape_moe.cli.main import run
from shape_moe.errors import ShapeMoeError
from shape_moe.evaluation.evaluated import Evaluation, read_evaluation
from shape_moe.evaluation.falls import Pairs
from shape_moe.jobs.evaluate_endpoints import EndpointOptions, evaluate_endpoints
from support.chat_server import serving
from support.data import write_lines


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(openai_server, "PAUSES", (0.0, 0.0, 0.0))


def outcomes_of(result: Evaluation):
    return {outcome.name: outcome for outcome in result.models[1].verdict.outcomes}


def replies_of(answers: dict[str, dict]):
    """A server that answers by the last message's text."""

    def reply(path, body):
        message = answers[body["messages"][-1]["content"]]
        said = message.get("content") or ""
        steps = [{"token": t, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": -0.1}]} for t in said.split()]
        reason = "tool_calls" if message.get("tool_calls") else message.pop("ends", "stop")
        logprobs = {"content": steps} if steps else None
        return 200, {"choices": [{"message": message, "logprobs": logprobs, "finish_reason": reason}]}

    return reply


def test_tool_calls_loops_and_missing_ends_are_seen(tmp_path) -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
        }
    ]

    def call(city: str) -> dict:
        made = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        return {"role": "assistant", "content": None, "tool_calls": [made]}

    cities = ["Rome", "Oslo", "Bern", "Kiel", "Lyon"]
    rows = [{"messages": [{"role": "user", "content": c}, call(c)], "tools": tools, "kind": "tools"} for c in cities]
    plain = {f"question {i}": f"answer {i}" for i in range(8)}
    rows += [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "kind": "plain"}
        for q, a in plain.items()
    ]
    file = write_lines(tmp_path / "mixed.jsonl", rows)
    dense = {**{c: call(c) for c in cities}, **{q: {"content": a} for q, a in plain.items()}}
    pruned = {c: {"content": f"I like {c}"} for c in cities}
    pruned |= {q: {"content": "so " * 24, "ends": "length"} for q in plain}
    with serving(replies_of(dense)) as one, serving(replies_of(pruned)) as other:
        result = evaluate_endpoints({"a": one, "b": other}, file, EndpointOptions(by="kind", general=False))
    found = outcomes_of(result)
    assert found["tools"].calls["made"] == Pairs(5, 5, 5, 0)
    assert found["tools"].exact is None
    assert found["plain"].exact == Pairs(8, 8, 8, 0)
    assert found["plain"].answers.loops == (0, 8)
    assert found["plain"].answers.no_ends == (0, 8)
    verdict = result.models[1].verdict
    assert str(verdict.word) == "damaged"
    assert "plain" in verdict.headline
    assert result.model == "a"


QUESTIONS = {f"question {i}": {"content": f"answer {i}"} for i in range(10)}


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": question, "response": answer["content"]} for question, answer in QUESTIONS.items()]
    return write_lines(tmp_path / "questions.jsonl", rows)


def command(one: str, other: str, data, *more: str) -> list[str]:
    return ["evaluate", "--endpoint", f"dense={one}", "--endpoint", f"small={other}", "--data", str(data), *more]


def test_the_command_says_its_verdict_and_ends_by_it(data, tmp_path, capsys) -> None:
    out = tmp_path / "figures.json"
    wrong = {question: {"content": "no idea"} for question in QUESTIONS}
    with (
        serving(replies_of(QUESTIONS)) as one,
        serving(replies_of(QUESTIONS)) as same,
        serving(replies_of(wrong)) as other,
    ):
        assert run(command(one, same, data, "--no-general", "--require", "no-loss", "-o", str(out))) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [
            "small.",
            "  Verdict: no loss seen. 10 examples: a loss of up to 28 % is not excluded; 189 without a loss would show "
            "2 %.",
        ]
        assert not out.with_name("figures.json.answers.jsonl").exists()
        assert read_evaluation(out).models[1].verdict.lines()[0] == lines[1].strip()
        assert run(["report", str(out), "-o", str(tmp_path / "report.html")]) == 0
        assert "a loss of up to 28 % is not excluded" in (tmp_path / "report.html").read_text(encoding="utf-8")
        capsys.readouterr()
        assert run(command(one, same, data, "--no-general", "--require", "safe", "--json")) == 3
        assert json.loads(capsys.readouterr().out)["models"][1]["verdict"]["verdict"] == "no loss seen"
        assert run(command(one, other, data, "--no-general", "--require", "no-loss", "--json")) == 3
        said = capsys.readouterr()
        assert json.loads(said.out)["models"][1]["verdict"]["verdict"] == "damaged"
        assert "Does not meet --require no-loss: small." in said.err
        assert run(command(one, other, data, "--require", "perfect")) == 2
        assert "safe or no-loss" in capsys.readouterr().err


def test_the_time_is_told_and_kept(tmp_path, monkeypatch, capsys) -> None:
    """Every question takes a second of a clock that the servers' answers move."""
    answers = {f"question {i}": {"content": f"answer {i}"} for i in range(60)}
    rows = [{"prompt": question, "response": answer["content"]} for question, answer in answers.items()]
    file = write_lines(tmp_path / "many.jsonl", rows)
    now = [0.0]

    def reply(path, body):
        now[0] += 1.0
        return replies_of(answers)(path, body)

    monkeypatch.setattr(sys.modules["shape_moe.jobs.evaluate_endpoints"], "clock", lambda: now[0])
    with serving(reply) as one, serving(reply) as other:
        whole = command(one, other, file, "--no-general", "--batch-size", "2")
        assert run([*whole, "--json"]) == 0
        said = capsys.readouterr()
        assert "The servers will be asked for about 2 min more." in said.err  # 4 of 60 are answered by both
        assert now[0] == 120
        assert run([*whole, "--judge-minutes", "1", "--json"]) == 0
        said = capsys.readouterr()
        document = json.loads(said.out)
        examples = document["models"][1]["verdict"]["outcomes"][0]["examples"]
        assert 20 < examples <= 34  # the first 4 are not counted
        assert any(f"only {examples} of 60 examples are used." in note for note in document["warnings"])


def failing(status: int, document, times: int = 10**9):
    """A server whose first answers are a failure."""
    left = [times]
    good = replies_of(QUESTIONS)

    def reply(path, body):
        left[0] -= 1
        return (status, document) if left[0] >= 0 else good(path, body)

    return reply


def test_three_served_models_that_are_not_safe_get_three_verdicts(tmp_path) -> None:
    """One that loops, one that answers well and calls no tools any more, and one that is judged on ten examples."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    plain = {f"question {i}": f"answer {i}" for i in range(120)}
    cities = [f"city {i}" for i in range(20)]

    def call(city: str) -> dict:
        function = {"name": "weather", "arguments": json.dumps({"city": city})}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "id": "1", "function": function}],
        }

    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in plain.items()
    ]
    calling = [{"messages": [{"role": "user", "content": c}, call(c)], "tools": tools} for c in cities]
    answers = {q: {"content": a} for q, a in plain.items()}
    dense = replies_of({**answers, **{c: call(c) for c in cities}})
    looping = replies_of({q: {"content": "so " * 24, "ends": "length"} for q in plain})
    silent = replies_of({**answers, **{c: {"content": "I do not know."} for c in cities}})
    ten, all_of_them = (
        write_lines(tmp_path / "ten.jsonl", rows[:10]),
        write_lines(tmp_path / "all.jsonl", rows + calling),
    )
    options = EndpointOptions(general=False)
    with serving(dense) as reference:
        found = []
        for reply, file in ((looping, ten), (silent, all_of_them), (dense, ten)):
            with serving(reply) as url:
                result = evaluate_endpoints({"dense": reference, "pruned": url}, file, options)
            found.append(result.models[1].verdict)
    assert [str(verdict.word) for verdict in found] == ["damaged", "measurable loss", "no loss seen"]
    assert found[1].reason.startswith("It calls no tools any more. Right tool calls fall from 100 % to 0 %")
    assert found[1].outcomes[0].exact == Pairs(120, 120, 0, 0)


def test_a_busy_server_is_asked_again_and_a_broken_one_is_given_up(data) -> None:
    options = EndpointOptions(general=False, at_a_time=1)
    with serving(replies_of(QUESTIONS)) as one, serving(failing(503, "busy", times=3)) as other:
        found = evaluate_endpoints({"dense": one, "small": other}, data, options)
        assert outcomes_of(found)[""].exact == Pairs(10, 10, 0, 0)
    asked = []

    def broken(path, body):
        asked.append(body["messages"][-1]["content"])
        return 500, "engine died"

    with serving(replies_of(QUESTIONS)) as one, serving(broken) as other:
        with pytest.raises(ShapeMoeError, match="refused with status 500: engine died"):
            evaluate_endpoints({"dense": one, "small": other}, data, options)
        assert asked.count("question 0") == 4
        assert set(Counter(asked).values()) == {4}


def slow(path, body):
    time.sleep(2)
    return replies_of(QUESTIONS)(path, body)


@pytest.mark.parametrize(
    ("reply", "arguments", "words"),
    [
        (failing(200, "<html>"), (), "did not answer as an OpenAI-compatible server does"),
        (failing(404, "no such model"), (), "status 404: no such model"),
        (failing(400, "bad request"), (), "status 400: bad request"),
        (slow, ("--timeout", "0.2"), "did not answer within 0.2 seconds"),
        (replies_of(QUESTIONS), ("--endpoint-model", "small=other"), "has no model 'other'; it has m"),
        (replies_of(QUESTIONS), ("--timeout", "0"), "--timeout must be above 0"),
    ],
)
def test_a_server_that_fails_is_one_sentence(data, capsys, reply, arguments, words) -> None:
    with serving(replies_of(QUESTIONS)) as one, serving(reply) as other:
        assert run(command(one, other, data, "--no-general", "--batch-size", "2", *arguments)) in {1, 2}
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_wrong_addresses_and_keys_are_told_without_the_key(data, capsys, monkeypatch) -> None:
    with serving(replies_of(QUESTIONS)) as one, serving(replies_of(QUESTIONS), key="right") as other:
        assert run(command(one, one.replace("/v1", "/api"), data)) == 1
        assert "status 404" in capsys.readouterr().err
        assert run(command(one, "http://127.0.0.1:9", data)) == 1
        assert "is the server there" in capsys.readouterr().err
        assert run(command(one, "127.0.0.1:9", data)) == 2
        assert "--endpoint takes NAME=URL" in capsys.readouterr().err
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        assert run(command(one, other, data)) == 1
        assert "needs a key: put it in OPENAI_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "s3cret-key")
        assert run(command(one, other, data)) == 1
        said = capsys.readouterr().err
        assert "does not accept the key in OPENAI_API_KEY" in said
        assert "s3cret-key" not in said
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        assert run(command(one, other, data, "--no-general", "-q")) == 0


def test_answers_without_log_probabilities_are_compared_word_by_word(data) -> None:
    asked = []

    def plain(path, body):
        asked.append(body)
        reply = replies_of(QUESTIONS)(path, body)[1]
        reply["choices"][0]["logprobs"] = None
        return 200, reply

    with serving(plain) as one, serving(plain) as other:
        with pytest.raises(ShapeMoeError, match="--top-logprobs 0"):
            evaluate_endpoints({"dense": one, "small": other}, data, EndpointOptions(general=False))
        asked.clear()
        options = EndpointOptions(general=False, top_logprobs=0)
        found = evaluate_endpoints({"dense": one, "small": other}, data, options).models[1].verdict
    assert not any("logprobs" in body for body in asked)
    (outcome,) = found.outcomes
    assert outcome.exact == Pairs(10, 10, 0, 0)
    assert outcome.kl is None
    assert any(line.startswith("KL was not measured") for line in found.lines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["M"], "MODEL has no effect"),
        (["--tasks", "x"], "--tasks has no effect"),
        (["--device", "cpu"], "--device has no effect"),
        (["--max-length", "9"], "--max-length has no effect"),
        (["--generate", "9"], "--generate has no effect"),
        (["--endpoint", "dense=http://127.0.0.1:9"], "same name"),
    ],
)
def test_options_that_servers_do_not_heed_are_refused(data, capsys, arguments, words) -> None:
    assert run(command("http://127.0.0.1:9", "http://127.0.0.1:8", data, *arguments)) == 2
    assert words in capsys.readouterr().err
