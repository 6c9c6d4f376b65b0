"""A local server of the OpenAI protocol with a real model behind it, which decodes greedily token by token."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


def greedy_steps(model, tokens: list[int], most: int) -> tuple[list[int], list[torch.Tensor], int | None]:
    """The greedy answer without the token that ends it, the log-probabilities at every step, and that token."""
    stops = model.generation_config.eos_token_id
    made, steps = [], []
    with torch.no_grad():
        while len(made) < most:
            logprobs = model(input_ids=torch.tensor([tokens + made])).logits[0, -1].float().log_softmax(-1)
            steps.append(logprobs)
            token = int(logprobs.argmax())
            if token in stops:
                return made, steps, token
            made.append(token)
    return made, steps, None


class ChatModel:
    """Answers of a model as chat and plain completions."""

    def __init__(self, model, tokenizer, *, names_end: bool = True, **changes: Any) -> None:
        self.model, self.tokenizer, self.names_end, self.changes = model, tokenizer, names_end, changes
        self.asked: list[dict[str, Any]] = []

    def reply(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and document."""
        self.asked.append(body)
        if refuse := self.changes.get("refuse"):
            return 400, {"error": {"message": refuse}}
        chat = path.endswith("chat/completions")
        if chat:
            text = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        else:
            text = body["prompt"]
        tokens = list(self.tokenizer(text, add_special_tokens=not chat).input_ids)
        made, steps, ended = greedy_steps(self.model, tokens, body["max_tokens"])
        shown = [*made, ended] if ended is not None and self.names_end else made
        said = self.tokenizer.decode(made)
        top = body["top_logprobs"] if chat else body["logprobs"]
        named = [self._named(step, top) for step in steps[: len(shown)]]
        names = [self.tokenizer.decode([token]) for token in shown]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if ended is None else "stop"}
        if chat:
            content = [
                {"token": name, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": v} for t, v in entries]}
                for name, entries in zip(names, named, strict=True)
            ]
            choice |= {"message": {"role": "assistant", "content": said}, "logprobs": {"content": content}}
        else:
            choice |= {"text": said, "logprobs": {"tokens": names, "top_logprobs": [dict(e) for e in named]}}
        if self.changes.get("no_logprobs"):
            choice["logprobs"] = None
        return 200, {"choices": [choice]}

    def _named(self, logprobs: torch.Tensor, top: int) -> list[tuple[str, float]]:
        found = logprobs.topk(min(top, len(logprobs)))
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [(self.tokenizer.decode([token]), value) for token, value in pairs]


@contextmanager
def serving(
    reply: Callable[[str, dict[str, Any]], tuple[int, dict[str, Any] | str]], name: str = "m", key: str | None = None
) -> Iterator[str]:
    """Serve on 127.0.0.1, to those who have the key; gives the base address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def send(self, status: int, document: dict[str, Any] | str) -> None:
            given = self.headers["Authorization"]
            if key is not None and given != f"Bearer {key}":
                status, document = 401, {"error": f"no access for {given}"}
            self.send_response(status)
            self.end_headers()
            self.wfile.write((document if isinstance(document, str) else json.dumps(document)).encode())

        def do_GET(self) -> None:
            self.send(200, {"data": [{"id": name}]}) if self.path == "/v1/models" else self.send(404, "no such page")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(*reply(self.path, body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients that gave up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
