"""Answers for prompts that lack one: from the model itself, or from an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shape_moe.calibration.examples import Tokeniser
from shape_moe.calibration.records import Record
from shape_moe.errors import DataError, ShapeMoeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int], None]
_TIMEOUT_SECONDS = 600.0
_REQUESTS_AT_A_TIME = 8


def generate_answers(
    model: PreTrainedModel,
    tokeniser: Tokeniser,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    batch_size: int,
    known: Mapping[int, list[int]] | None = None,
    keep: Callable[[dict[int, list[int]]], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> dict[int, list[int]]:
    """Let the model answer prompts greedily, in batches, with a KV cache.

    Prompts are padded on the left for generation only; the answers are traced later, right-padded, in one
    teacher-forced pass.

    Args:
        model: the model that answers.
        tokeniser: turns records into prompts.
        records: records without a response.
        max_new_tokens: upper limit of an answer's length.
        batch_size: prompts per batch.
        known: answers of an earlier run, which are not made again.
        keep: called with all answers so far after every batch.
        progress: called with the number of answers that are new.

    Returns:
        Answer tokens (end-of-sequence token included) by record index.
    """
    import torch

    answers = dict(known or {})
    prompts = {record.index: tokeniser.prompt(record) for record in records if record.index not in answers}
    order = sorted(prompts, key=lambda index: (-len(prompts[index]), index))
    pad_id = pad_token_id(model, tokeniser)
    stops = _stop_ids(model)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in rows)
        ids = torch.full((len(rows), width), pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for row, index in enumerate(rows):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        with torch.no_grad():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad_id,
            )
        for row, index in enumerate(rows):
            answers[index] = _until_stop(output[row, width:].tolist(), stops)
        keep(answers)
        progress(len(rows))
    return answers


def pad_token_id(model: PreTrainedModel, tokeniser: Tokeniser) -> int:
    """A token id to pad with; its value never matters, because padding is masked."""
    for value in (tokeniser.tokenizer.pad_token_id, model.config.pad_token_id, tokeniser.tokenizer.eos_token_id):
        if isinstance(value, int):
            return value
    return 0


def _stop_ids(model: PreTrainedModel) -> set[int]:
    stop = getattr(model.generation_config, "eos_token_id", None)
    if stop is None:
        return set()
    return set(stop) if isinstance(stop, list) else {stop}


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[: i + 1]
    return tokens


def fetch_answers(
    url: str,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    template: bool,
    template_args: dict[str, Any] | None = None,
    progress: Progress = lambda _: None,
) -> list[Record]:
    """Take the answers from an OpenAI-compatible server (``URL`` up to and including ``/v1``).

    Args:
        url: base address of the server.
        records: the records; those that have a response are passed through.
        max_new_tokens: upper limit of an answer's length.
        template: use the chat endpoint; otherwise plain completions of the raw prompt.
        template_args: handed to the server's chat template.
        progress: called with the number of answers that arrived.

    Raises:
        ShapeMoeError: when the server cannot be reached or does not answer as the protocol says.
    """
    import httpx

    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    with httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
        model = _call(client, "GET", f"{base}/models")["data"][0]["id"]

        def ask(record: Record) -> Record:
            if not record.lacks_response:
                return record
            body: dict[str, Any] = {"model": model, "max_tokens": max_new_tokens, "temperature": 0}
            if template:
                body["messages"] = list(record.messages or [{"role": "user", "content": record.prompt}])
                if template_args:
                    body["chat_template_kwargs"] = template_args
                text = _call(client, "POST", f"{base}/chat/completions", body)["choices"][0]["message"]["content"]
            else:
                body["prompt"] = record.prompt
                text = _call(client, "POST", f"{base}/completions", body)["choices"][0]["text"]
            progress(1)
            return _with_response(record, text)

        with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:
            return list(pool.map(ask, records))


def _call(client: Any, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    import httpx

    try:
        reply = client.request(method, url, json=body)
        reply.raise_for_status()
        return reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ShapeMoeError(
            f"The endpoint {url} did not answer as an OpenAI-compatible server does: {error}"
        ) from error


def _with_response(record: Record, text: str | None) -> Record:
    if not text:
        raise DataError(f"{record.where}: the endpoint gave an empty answer.")
    if record.messages is not None:
        return replace(record, messages=(*record.messages, {"role": "assistant", "content": text}))
    return replace(record, response=text)
