"""Answers of the model itself, and answers from an endpoint on this machine."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shape_moe.calibration.examples import Tokeniser, TokenOptions
from shape_moe.calibration.records import Record
from shape_moe.calibration.responses import fetch_answers, generate_answers
from shape_moe.demo.tasks import examples
from shape_moe.errors import ShapeMoeError


@pytest.fixture(scope="module")
def model(embedded):
    return AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()


@pytest.fixture
def tokeniser(embedded):
    return Tokeniser(AutoTokenizer.from_pretrained(embedded), 512, TokenOptions(template=False))


def test_the_embedded_model_answers_its_tasks(model, tokeniser) -> None:
    rows = [row for task in ("sorting", "words", "reversal") for row in examples(task, 5, seed=3, held_out=True)]
    records = [Record(i, "r", prompt=row["prompt"]) for i, row in enumerate(rows)]
    answers = generate_answers(model, tokeniser, records, max_new_tokens=64, batch_size=4)
    texts = [tokeniser.tokenizer.decode(answers[i]) for i in range(len(rows))]
    right = sum(text == row["response"] for text, row in zip(texts, rows, strict=True))
    assert right >= 14  # different lengths in one batch: left padding does not disturb the answers


def test_batching_does_not_change_answers(model, tokeniser) -> None:
    rows = examples("addition", 6, seed=4)
    records = [Record(i, "r", prompt=row["prompt"]) for i, row in enumerate(rows)]
    records.append(Record(6, "r", prompt="sort 12345678="))
    one = generate_answers(model, tokeniser, records, max_new_tokens=20, batch_size=1)
    many = generate_answers(model, tokeniser, records, max_new_tokens=20, batch_size=7)
    assert one == many
    assert all(answer[-1] == 10 for answer in one.values())


def test_answers_end_at_the_limit(model, tokeniser) -> None:
    answers = generate_answers(model, tokeniser, [Record(0, "r", prompt="words 7777=")], max_new_tokens=3, batch_size=1)
    assert len(answers[0]) == 3


def test_prompt_and_answer_stay_within_the_limit(model, embedded) -> None:
    """A short and a long prompt in one batch: each gets the room that is left behind it."""
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    tokeniser = Tokeniser(tokenizer, 512, TokenOptions(template=False, max_length=14))
    records = [
        Record(0, "r", prompt="words 7777="),
        Record(1, "r", prompt="sort 12345678="),
        Record(2, "r", prompt="ab"),
    ]
    answers = generate_answers(model, tokeniser, records, max_new_tokens=20, batch_size=3)
    assert [len(answers[i]) for i in range(3)] == [3, 0, 12]


class Handler(BaseHTTPRequestHandler):
    requests: list[tuple[str, dict]] = []  # noqa: RUF012
    reply = "an answer"
    choices: list | None = None
    keys: set = set()  # noqa: RUF012

    def log_message(self, *args):
        pass

    def send(self, document):
        body = json.dumps(document).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send({"data": [{"id": "served"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.requests.append((self.path, body))
        Handler.keys.add(self.headers["Authorization"])
        if Handler.choices is not None:
            self.send({"choices": Handler.choices})
        elif self.path.endswith("/chat/completions"):
            self.send({"choices": [{"message": {"content": Handler.reply}}]})
        else:
            self.send({"choices": [{"text": Handler.reply}]})


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Handler.requests, Handler.reply, Handler.choices, Handler.keys = [], "an answer", None, set()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_endpoints_answer_chats_and_raw_prompts(endpoint) -> None:
    records = [
        Record(0, "r", prompt="p"),
        Record(1, "r", prompt="q"),
        Record(2, "r", messages=({"role": "user", "content": "u"},)),
    ]
    kept = []
    found = fetch_answers(
        endpoint,
        records,
        max_new_tokens=9,
        template=True,
        template_args={"enable_thinking": False},
        known={1: "given"},
        keep=lambda answers: kept.append(dict(answers)),
    )
    assert found == {0: "an answer", 1: "given", 2: "an answer"}
    assert kept[-1] == found
    paths, bodies = zip(*Handler.requests, strict=True)
    assert set(paths) == {"/v1/chat/completions"}
    asked = sorted(body["messages"][0]["content"] for body in bodies)
    assert (asked, bodies[0]["messages"][0]["role"]) == (["p", "u"], "user")
    assert (bodies[0]["model"], bodies[0]["max_tokens"]) == ("served", 9)
    assert bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    raw = fetch_answers(f"{endpoint}/v1", records[:1], max_new_tokens=9, template=False)
    assert raw == {0: "an answer"}
    assert Handler.requests[-1][0] == "/v1/completions"
    assert Handler.requests[-1][1]["prompt"] == "p"


def test_endpoints_get_the_key_from_the_environment(endpoint, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    fetch_answers(endpoint, [Record(0, "r", prompt="p")], max_new_tokens=9, template=True)
    assert Handler.keys == {"Bearer secret"}


def test_endpoints_that_do_not_answer(endpoint) -> None:
    Handler.reply = ""
    record = Record(0, "line 3", prompt="p")
    assert fetch_answers(endpoint, [record], max_new_tokens=9, template=True) == {0: ""}
    Handler.reply = {"no": "text"}
    Handler.choices = []
    kept = []
    with pytest.raises(ShapeMoeError, match=r"did not answer as an OpenAI-compatible server does \(IndexError"):
        fetch_answers(endpoint, [record], max_new_tokens=9, template=True, known={7: "kept"}, keep=kept.append)
    assert kept == [{7: "kept"}]  # what had arrived is not lost
    with pytest.raises(ShapeMoeError, match="did not answer .*is the server there"):
        fetch_answers("http://127.0.0.1:9", [Record(0, "r", prompt="p")], max_new_tokens=9, template=True)
