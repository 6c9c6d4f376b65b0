"""Responses of an inference server with the experts that served every token: read, checked, and decoded.

vLLM answers with one base64 ``.npy`` per choice, integers ``[prompt + output - 1, decoder layers, k]``. SGLang answers
with base64 of the same numbers as raw little-endian int32, without a shape. The last token that was sampled never went
through the model, hence the ``- 1``. Ids are those of a set: their order means nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.errors import DataError

Engine = Literal["vllm", "sglang"]

_FIELD = "routed_experts"
_PLACES = ("meta_info", "sgl_ext", "sglext")
"""Objects beside the choice's own fields in which SGLang's endpoints put the ids, by endpoint and version."""
_NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class Served:
    """The routing of one response.

    Attributes:
        engine: what answered.
        prompt: int16 [P, L, k], experts of the prompt tokens, ascending; rows of L are the model's MoE layers.
        responses: int16 [R, L, k] for every choice, experts of the response tokens that went through the model.
        answered: whether there is any response token, so that the last prompt token predicts one.
    """

    engine: Engine
    prompt: NDArray[np.int16]
    responses: tuple[NDArray[np.int16], ...]
    answered: bool = True


def decode_response(response: Mapping[str, Any], snapshot: Snapshot, where: str) -> Served:
    """Decode one response; a prompt that several choices share is taken once.

    Args:
        response: a response of an OpenAI-compatible endpoint, or of SGLang's own.
        snapshot: the model that answered.
        where: the response's place, for messages.

    Raises:
        DataError: for a response without routed experts, or whose shape, ids or sets are not this model's.
    """
    decoded = [_decode(payload, snapshot, where) for payload in _payloads(response, where)]
    engines = {engine for engine, _ in decoded}
    if len(engines) > 1:
        raise DataError(f"{where}: the choices are encoded in different ways.")
    arrays = [array for _, array in decoded]
    prompt, output = _usage(response, where)
    rows, wanted = sum(len(array) for array in arrays), len(arrays) * (prompt - 1) + output
    if rows != wanted or min(len(array) for array in arrays) < min(prompt, wanted):
        raise DataError(
            f"{where}: there are routed experts for {rows:,} tokens, but {prompt:,} prompt and {output:,} response "
            f"tokens in {len(arrays)} choice{'s' if len(arrays) > 1 else ''} make {wanted:,}; every request must have "
            "one prompt and be answered whole, its prompt included."
        )
    checked = [_check(array, snapshot, where) for array in arrays]
    return Served(engines.pop(), checked[0][:prompt], tuple(array[prompt:] for array in checked), output > 0)


def _payloads(response: Mapping[str, Any], where: str) -> list[str]:
    choices = response.get("choices")
    if choices is None:
        found = [_payload(response)]
    elif isinstance(choices, list) and choices:
        found = [_payload(choice) for choice in choices]
        if found == [None]:
            found = [_payload(response)]
    else:
        raise DataError(f"{where}: the response has no choices.")
    payloads = [payload for payload in found if payload is not None]
    if len(payloads) < len(found):
        raise DataError(
            f"{where}: the response has no {_FIELD}; start the server with --enable-return-routed-experts "
            "(and ask SGLang for them in every request)."
        )
    return payloads


def _payload(holder: Any) -> str | None:
    if not isinstance(holder, Mapping):
        return None
    for place in (holder, *(holder.get(name) for name in _PLACES)):
        if isinstance(place, Mapping) and isinstance(place.get(_FIELD), str):
            return str(place[_FIELD])
    return None


def _usage(response: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Prompt and response tokens; the latter over all choices."""
    holder = response.get("usage") or response.get("meta_info")
    if isinstance(holder, Mapping):
        prompt, output = holder.get("prompt_tokens"), holder.get("completion_tokens")
        if type(prompt) is int and type(output) is int and prompt >= 1 and output >= 0:
            return prompt, output
    raise DataError(
        f"{where}: the response has no usage with prompt_tokens and completion_tokens, so prompt and response "
        "cannot be told apart; collect whole responses, not streamed pieces."
    )


def _decode(payload: str, snapshot: Snapshot, where: str) -> tuple[Engine, NDArray[np.integer]]:
    try:
        content = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: {_FIELD} is not base64.") from error
    per_token = (snapshot.moe.num_layers, snapshot.moe.top_k)
    if content.startswith(_NPY):
        return "vllm", _read_npy(content, per_token, where)
    size = 4 * per_token[0] * per_token[1]
    if not content or len(content) % size:
        raise DataError(
            f"{where}: {_FIELD} holds {len(content):,} bytes, which are not whole tokens of {per_token[0]} layers and "
            f"{per_token[1]} experts in int32; is this the model that answered?"
        )
    return "sglang", np.frombuffer(content, dtype="<i4").reshape(-1, *per_token)


def _read_npy(content: bytes, per_token: tuple[int, int], where: str) -> NDArray[np.integer]:
    """The array of a ``.npy``; its header is checked before anything of the size that it claims is made."""
    stream = io.BytesIO(content)
    try:
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[np.lib.format.read_magic(stream)]
        shape, column_major, dtype = read_header(stream)
    except (ValueError, KeyError) as error:
        raise DataError(f"{where}: {_FIELD} is not a readable .npy array.") from error
    if len(shape) != 3 or shape[1:] != per_token:
        raise DataError(
            f"{where}: {_FIELD} has shape {shape}, but the model's {per_token[0]} layers and {per_token[1]} experts "
            f"per token make (tokens, {per_token[0]}, {per_token[1]}); is this the model that answered?"
        )
    rest = stream.read()
    if dtype.kind not in "iu" or len(rest) != shape[0] * shape[1] * shape[2] * dtype.itemsize:
        raise DataError(f"{where}: {_FIELD} is not a whole array of integers.")
    array: NDArray[np.integer] = np.frombuffer(rest, dtype=dtype).reshape(shape, order="F" if column_major else "C")
    return array


def _check(array: NDArray[np.integer], snapshot: Snapshot, where: str) -> NDArray[np.int16]:
    """The MoE layers' ids, ascending; dense layers carry numbers without meaning."""
    layers, experts = snapshot.moe_layers, snapshot.moe.num_experts
    ids = array[:, list(layers)]
    wrong = (ids < 0) | (ids >= experts)
    if wrong.any():
        token, row, slot = np.argwhere(wrong)[0]
        raise DataError(
            f"{where}: token {token} has expert {ids[token, row, slot]} in layer {layers[row]}, but experts are 0 to "
            f"{experts - 1}."
        )
    ranked = np.sort(ids.astype(np.int16), axis=2)
    twice = (ranked[:, :, 1:] == ranked[:, :, :-1]).any(axis=2)
    if twice.any():
        token, row = np.argwhere(twice)[0]
        raise DataError(
            f"{where}: token {token} has an expert twice in layer {layers[row]} ({ranked[token, row].tolist()}): the "
            "server did not record it."
        )
    return ranked


def cells_of(served: Served) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """The parts of a response, each with its cell (see :data:`shape_moe.calibration.batches.CELLS`).

    The last response token never went through the model, so every one that did is followed by another.
    """
    last = len(served.prompt) - (1 if served.answered else 0)
    yield 0, served.prompt[:last]
    yield 1, served.prompt[last:]
    for response in served.responses:
        yield 3, response
