"""Responses as inference servers give them, made from the routing that a model really had."""

from __future__ import annotations

import base64
import io

import numpy as np

from shape_moe.calibration.batches import make_batch
from support.naive_trace import capture

SAID = "What the model said."


def npy(array: np.ndarray) -> str:
    """Base64 of a ``.npy``, as vLLM sends it."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return base64.b64encode(stream.getvalue()).decode()


def int32(array: np.ndarray) -> str:
    """Base64 of raw int32, as SGLang sends it."""
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def usage(prompt: int, output: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def vllm_response(*arrays: np.ndarray, prompt: int, dtype="uint8") -> dict:
    """A chat completion of vLLM; every choice repeats the prompt."""
    choices = [
        {"index": i, "message": {"role": "assistant", "content": SAID}, "routed_experts": npy(array.astype(dtype))}
        for i, array in enumerate(arrays)
    ]
    output = sum(len(array) - prompt + 1 for array in arrays)
    return {"id": "chatcmpl-1", "model": "served", "choices": choices, "usage": usage(prompt, output)}


def sglang_response(array: np.ndarray, prompt: int, place: str = "meta_info") -> dict:
    """A response of SGLang: its own endpoint (``native``), or an object on the choice or beside the choices."""
    payload, counts = {"routed_experts": int32(array)}, usage(prompt, len(array) - prompt + 1)
    if place == "native":
        return {"text": SAID, "meta_info": {**payload, **counts}}
    choice = {"index": 0, "text": SAID}
    if place == "sglext":
        return {"model": "served", "choices": [choice], "sglext": payload, "usage": counts}
    return {"model": "served", "choices": [{**choice, place: payload}], "usage": counts}


def routed_ids(model, example, seed: int = 0) -> np.ndarray:
    """The experts of every token in every decoder layer [T, layers, k], in a random order; zeros in dense layers."""
    captured = capture(model, make_batch([example], [0], 0))
    top_k = next(iter(captured.values())).ids.shape[1]
    ids = np.zeros((len(example.tokens), len(model.model.layers), top_k), dtype=np.int64)
    for layer, found in captured.items():
        ids[:, layer] = found.ids.numpy()
    return np.random.default_rng(seed).permuted(ids, axis=2)


def random_ids(rng: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """Random sets of experts [T, layers, k]."""
    return rng.permuted(np.broadcast_to(np.arange(experts), (tokens, layers, experts)), axis=2)[:, :, :top_k]
