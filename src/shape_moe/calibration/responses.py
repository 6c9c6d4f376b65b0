"""Answers for prompts that lack one: from the model itself, or from an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.loading import input_device, vocabulary_size
from shape_moe.calibration.examples import Tokeniser
from shape_moe.calibration.records import Record
from shape_moe.openai_server import OpenAIServer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int], None]
Reply = str | dict[str, Any]
"""An endpoint's answer: its text, or the message where that calls tools or thinks."""
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
        max_new_tokens: upper limit of an answer's length; ``tokeniser.limit`` for prompt and answer holds as well.
        batch_size: prompts per batch.
        known: answers of an earlier run, which are not made again.
        keep: called with all answers so far after every batch.
        progress: called with the number of answers that are new.

    Returns:
        Answer tokens (end-of-sequence token included) by record index.
    """
    answers = dict(known or {})
    prompts = {record.index: tokeniser.prompt(record) for record in records if record.index not in answers}
    room = {index: tokeniser.room(len(prompt), max_new_tokens) for index, prompt in prompts.items()}
    for batch in greedy_answers(model, prompts, room, batch_size=batch_size, pad_id=pad_token_id(model, tokeniser)):
        answers |= batch
        keep(answers)
        progress(len(batch))
    return answers


def greedy_answers(
    model: PreTrainedModel,
    prompts: Mapping[int, Sequence[int]],
    room: Mapping[int, int],
    *,
    batch_size: int,
    pad_id: int,
) -> Iterator[dict[int, list[int]]]:
    """Continue prompts greedily, longest first, in left-padded batches with a KV cache.

    Args:
        model: the model that answers.
        prompts: token ids by any key.
        room: the most tokens of each answer.
        batch_size: prompts per batch.
        pad_id: token id of the padding.

    Yields:
        The answers of one batch by key, end-of-sequence token included.
    """
    import torch

    order = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
    stops, device = stop_ids(model), input_device(model)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[key]) for key in rows)
        ids = torch.full((len(rows), width), pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for row, key in enumerate(rows):
            ids[row, width - len(prompts[key]) :] = torch.tensor(prompts[key])
            mask[row, width - len(prompts[key]) :] = 1
        longest = max(room[key] for key in rows)
        if longest:
            with torch.no_grad():
                ids = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=longest,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,  # a checkpoint's own settings would bend what greedy means
                    no_repeat_ngram_size=0,
                    use_cache=True,
                    pad_token_id=pad_id,
                )
        yield {key: until_stop(ids[row, width : width + room[key]].tolist(), stops) for row, key in enumerate(rows)}


def pad_token_id(model: PreTrainedModel, tokeniser: Tokeniser) -> int:
    """A token id to pad with: which one does not matter, because padding is masked, but the model must embed it."""
    for value in (
        tokeniser.tokenizer.pad_token_id,
        model.config.get_text_config().pad_token_id,
        tokeniser.tokenizer.eos_token_id,
    ):
        if isinstance(value, int) and 0 <= value < vocabulary_size(model):
            return value
    return 0


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    stop = getattr(model.generation_config, "eos_token_id", None)
    if stop is None:
        return frozenset()
    return frozenset(stop) if isinstance(stop, list) else frozenset([stop])


def until_stop(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Tokens up to and with the first that ends an answer."""
    for i, token in enumerate(tokens):
        if token in stops:
            return list(tokens[: i + 1])
    return list(tokens)


def fetch_answers(
    url: str,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    template: bool,
    template_args: dict[str, Any] | None = None,
    known: Mapping[int, Reply] | None = None,
    keep: Callable[[dict[int, Reply]], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> dict[int, Reply]:
    """Take the answers from an OpenAI-compatible server (``URL`` up to and including ``/v1``).

    Args:
        url: base address of the server; a key in the environment variable ``OPENAI_API_KEY`` is sent to it.
        records: records without a response.
        max_new_tokens: upper limit of an answer's length.
        template: use the chat endpoint; otherwise plain completions of the raw prompt.
        template_args: handed to the server's chat template.
        known: answers of an earlier run, which are not asked for again.
        keep: called with all answers so far, now and then and at the end, also when the server fails.
        progress: called with the number of answers that arrived.

    Returns:
        Texts by record index, messages where they call tools or think; an empty text where the server gave none.

    Raises:
        ShapeMoeError: when the server cannot be reached or does not answer as the protocol says.
    """
    answers = dict(known or {})
    missing = [record for record in records if record.index not in answers]
    if not missing:
        return answers
    with OpenAIServer(url) as server:
        request = _Request(server, server.model(), max_new_tokens, template, template_args or {})
        with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:
            waiting = {pool.submit(request.ask, record): record.index for record in missing}
            try:
                for count, done in enumerate(as_completed(waiting), start=1):
                    answers[waiting[done]] = done.result()
                    progress(1)
                    if count % _REQUESTS_AT_A_TIME == 0:
                        keep(answers)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                keep(answers)
    return answers


@dataclass(frozen=True)
class _Request:
    server: OpenAIServer
    model: str
    max_new_tokens: int
    template: bool
    template_args: dict[str, Any]

    def ask(self, record: Record) -> Reply:
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.max_new_tokens, "temperature": 0}
        if not self.template:
            body["prompt"] = record.prompt
            return self.server.post("completions", body, lambda reply: str(reply["choices"][0]["text"] or ""))
        body["messages"] = messages_for_server(record)
        if record.tools:
            body["tools"] = list(record.tools)
        if self.template_args:
            body["chat_template_kwargs"] = self.template_args
        return self.server.post("chat/completions", body, lambda reply: _reply(reply["choices"][0]["message"]))


def messages_for_server(record: Record) -> list[dict[str, Any]]:
    """The messages of a record as the protocol wants them: arguments of tool calls are text there."""
    messages = []
    asked: Sequence[dict[str, Any]] = record.messages or [{"role": "user", "content": record.prompt}]
    for message in asked:
        calls = message.get("tool_calls")
        messages.append({**message, "tool_calls": [_call_as_text(call) for call in calls]} if calls else message)
    return messages


def _call_as_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call["function"]["name"], **call, "function": {**call["function"], "arguments": text}}


def _reply(message: Any) -> Reply:
    found = {
        name: message[name]
        for name in ("tool_calls", "reasoning_content")
        if isinstance(message, dict) and message.get(name)
    }
    text = str(message["content"] or "")
    return {"content": text or None, **found} if found else text
