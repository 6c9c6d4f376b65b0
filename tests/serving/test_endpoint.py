"""The canary on a server: a real model behind the protocol, and everything that can be wrong with what answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shape_moe.calibration.records import DataOptions
from shape_moe.demo.tasks import examples
from shape_moe.errors import ShapeMoeError
from shape_moe.jobs.prune import prune
from shape_moe.jobs.prune_options import PruneOptions
from shape_moe.jobs.session import ExampleOptions
from shape_moe.jobs.verify import verify
from shape_moe.openai_server import OpenAIServer
from shape_moe.pruning.canary import load_canary
from shape_moe.selection.select import SelectOptions
from shape_moe.serving.endpoint import ask_canary
from support.data import write_lines


@pytest.fixture(scope="module")
def pruned(embedded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    file = write_lines(folder / "words.jsonl", examples("words", 25, seed=1))
    options = PruneOptions(
        SelectOptions(keep=0.6),
        ExampleOptions(DataOptions(str(file))),
        device="cpu",
        dtype="float32",
    )
    return prune(embedded, folder / "out", options).path


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def serve():
    """Serve a model with vLLM's ``prompt_logprobs``; ``tokenize`` turns texts into ids."""
    servers = []

    def start(model, tokenize, *, logprobs=True):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def send(self, document):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            def do_GET(self):
                self.send({"data": [{"id": "pruned"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                ids = tokenize(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
                choice = {"text": ""}
                if logprobs:
                    choice["prompt_logprobs"] = [None, *distributions(ids, body["prompt_logprobs"])]
                self.send({"choices": [choice]})

        def distributions(ids, top):
            with torch.no_grad():
                found = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for position, token in enumerate(ids[1:]):
                named = {token, *found[position].topk(top).indices.tolist()}
                yield {str(i): {"logprob": found[position, i].item()} for i in named}

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def tokenizer_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def checks_of(pruned, url) -> dict:
    return {check.name: check for check in verify(pruned, endpoint=url)}


def test_the_right_model_passes(pruned, serve) -> None:
    url = serve(load(pruned), tokenizer_of(pruned))
    checks = checks_of(pruned, url)
    assert all(check.passed for check in checks.values())
    with OpenAIServer(url) as server:
        result = ask_canary(server, "pruned", load_canary(pruned / "shape" / "canary.json"))
    assert result.largest_difference < 1e-4
    assert result.positions > 200


def test_the_dense_model_under_the_pruned_name_fails(pruned, embedded, serve) -> None:
    checks = checks_of(pruned, serve(load(embedded), tokenizer_of(embedded)))
    assert checks["endpoint's canary"].passed is False
    assert "another model answers there" in checks["endpoint's canary"].detail
    assert checks["endpoint's tokens"].passed is True


def test_a_kernel_that_ignores_the_remapping_fails(pruned, serve) -> None:
    """Logical ids used as places among the kept experts: the wrong experts answer."""
    model = load(pruned)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        places = torch.arange(experts.total_experts).clamp(max=experts.num_experts - 1)
        experts.__dict__["_slots"] = places
    checks = checks_of(pruned, serve(model, tokenizer_of(pruned)))
    assert checks["endpoint's canary"].passed is False


def test_another_tokenizer_fails(pruned, serve) -> None:
    def shifted(text: str) -> list[int]:
        return [(token + 1) % 256 for token in text.encode()]

    checks = checks_of(pruned, serve(load(pruned), shifted))
    assert checks["endpoint's tokens"].passed is False
    assert "another tokenizer is in use" in checks["endpoint's tokens"].detail
    assert checks["endpoint's canary"].passed is True  # token ids go out: the model itself is right


def test_servers_without_prompt_logprobs_are_named(pruned, serve) -> None:
    url = serve(load(pruned), tokenizer_of(pruned), logprobs=False)
    check = checks_of(pruned, url)["endpoint's canary"]
    assert check.passed is False
    assert "KeyError: 'prompt_logprobs'" in check.detail
    with OpenAIServer("http://127.0.0.1:9") as server, pytest.raises(ShapeMoeError, match="did not answer"):
        server.model()
