"""What a model behind an OpenAI-compatible server answers, with its most likely tokens at every step."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, isfinite, log
from typing import Any

from shape_moe.calibration.records import Record
from shape_moe.calibration.responses import messages_for_server
from shape_moe.errors import ShapeMoeError, UsageError
from shape_moe.evaluation.tool_call_formats import Calls, calls_of_message, parse_calls
from shape_moe.openai_server import OpenAIServer

TOP_LOGPROBS = 20
"""How many tokens a server names at each step: the most that most servers take."""
END = "<end of answer>"
"""Stands for whatever token ends an answer; servers do not agree on whether they name it."""
_ENDED = frozenset({"stop", "tool_calls", "function_call", "eos", "eos_token", "stop_sequence"})
_SMALLEST = 1e-6
"""Probabilities that are what others leave of 1 are no better known than this."""

Named = Mapping[str, float]
"""Log-probabilities (natural) of the tokens that a server names."""


@dataclass(frozen=True)
class ServedAnswer:
    """A greedy answer.

    Attributes:
        text: what it says.
        calls: the tool calls that it makes.
        tokens: its tokens as text, :data:`END` included where the model ended it itself.
        named: the most likely tokens at the first steps, as many as the server told.
        ended: whether the model ended it itself.
    """

    text: str
    calls: Calls
    tokens: tuple[str, ...]
    named: tuple[Named, ...]
    ended: bool


@dataclass(frozen=True)
class ServedModel:
    """A model on a server, asked greedily.

    Attributes:
        server: the server.
        model: its name there.
        top_logprobs: how many tokens are to be named at each step; with 0 answers are taken word by word.
        chat: ask the chat endpoint, which applies the chat template; otherwise plain completions of raw prompts.
        template_args: handed to the server's chat template.
    """

    server: OpenAIServer
    model: str
    top_logprobs: int = TOP_LOGPROBS
    chat: bool = True
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.top_logprobs < 0:
            raise UsageError(f"--top-logprobs must be at least 0, not {self.top_logprobs}.")

    def ask(self, record: Record, max_tokens: int) -> ServedAnswer:
        """Let the model answer.

        Args:
            record: a prompt, or a conversation whose last message is not the assistant's.
            max_tokens: the most tokens of the answer.

        Raises:
            ShapeMoeError: when the server cannot be reached, refuses, or gives no log-probabilities.
        """
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0}
        try:
            if not self.chat:
                body |= {"prompt": record.prompt}
                body |= {"logprobs": self.top_logprobs} if self.top_logprobs else {}
                return self.server.post("completions", body, self._completion)
            body["messages"] = messages_for_server(record)
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {}
            if record.tools:
                body["tools"] = list(record.tools)
            if self.template_args:
                body["chat_template_kwargs"] = dict(self.template_args)
            return self.server.post("chat/completions", body, lambda reply: self._chat_answer(reply, record))
        except ShapeMoeError as error:
            if "refused" in str(error) and "logprobs" in str(error):
                raise ShapeMoeError(
                    f"{error} (--top-logprobs N asks for fewer than {self.top_logprobs}, 0 for none.)"
                ) from error
            raise

    def _chat_answer(self, reply: Any, record: Record) -> ServedAnswer:
        choice = reply["choices"][0]
        message, steps = choice["message"], (choice.get("logprobs") or {}).get("content") or []
        text = str(message.get("content") or "")
        made = message.get("tool_calls") or message.get("function_call")
        calls = calls_of_message(message) if made else parse_calls(text, record.tools or ())
        if not self.top_logprobs or (not steps and (made or not text)):  # some servers name no tokens of a call
            words = text + ("\n" + json.dumps(_named_calls(calls), sort_keys=True) if made else "")
            return _answer(text, calls, _words(words), [], choice["finish_reason"])
        tokens = [_key(step) for step in steps]
        named = [_merged((_key(entry), entry["logprob"]) for entry in step.get("top_logprobs") or ()) for step in steps]
        return self._checked(_answer(text, calls, tokens, named, choice["finish_reason"]))

    def _completion(self, reply: Any) -> ServedAnswer:
        choice = reply["choices"][0]
        text, steps = str(choice["text"] or ""), choice.get("logprobs") or {}
        if not self.top_logprobs:
            return _answer(text, parse_calls(text), _words(text), [], choice["finish_reason"])
        named = [_merged((found or {}).items()) for found in steps.get("top_logprobs") or ()]
        answer = _answer(text, parse_calls(text), list(steps.get("tokens") or ()), named, choice["finish_reason"])
        return answer if not text else self._checked(answer)

    def _checked(self, answer: ServedAnswer) -> ServedAnswer:
        if not answer.named or not all(answer.named):
            raise ShapeMoeError(
                f"The endpoint {self.server.base} gives no log-probabilities (logprobs, top_logprobs): start it so "
                "that it does, or compare answers word by word and without KL (--top-logprobs 0)."
            )
        return answer


def _answer(text: str, calls: Calls, tokens: list[str], named: list[Named], reason: Any) -> ServedAnswer:
    ended = reason in _ENDED
    if ended and len(tokens) > 1 and "".join(tokens) != text == "".join(tokens[:-1]):
        tokens = tokens[:-1]  # the server names the token that ended the answer
    return ServedAnswer(text, calls, (*tokens, *([END] if ended else ())), tuple(named), ended)


def _words(text: str) -> list[str]:
    """Words with the space before them, as stand-ins for tokens."""
    return re.findall(r"\s*\S+|\s+$", text)


def _named_calls(calls: Calls) -> list[Any]:
    """Calls without what servers make up, such as ids."""
    return [[call.name, call.problem or dict(call.arguments or {})] for call in calls]


def _key(step: Mapping[str, Any]) -> str:
    """A token's text, and its bytes where they are no text of their own."""
    text = str(step["token"])
    return f"{text}{step['bytes']}" if "\ufffd" in text and step.get("bytes") else text


def _merged(entries: Any) -> Named:
    """Log-probabilities by token; those of tokens that look alike are added."""
    found: dict[str, float] = {}
    for token, value in entries:
        logprob = float(value)
        found[token] = log(exp(found[token]) + exp(logprob)) if token in found else logprob
    return {token: value for token, value in found.items() if isfinite(value)}


def partial_kl(dense: Named, other: Named) -> tuple[float, float]:
    """KL divergence of two distributions of which only the most likely tokens are known.

    All tokens that not both servers name are taken as one. Putting outcomes together never makes a divergence larger,
    so that the true one is no smaller; where both name the whole vocabulary it is the true one.

    Args:
        dense: log-probabilities of the dense model's most likely tokens.
        other: those of the other model's.

    Returns:
        ``sum p log(p / q)`` in nats, and the dense model's probability outside of what it names.
    """
    common = dense.keys() & other.keys()
    p_rest = max(0.0, 1.0 - sum(exp(dense[token]) for token in sorted(common)))
    q_rest = max(_SMALLEST, 1.0 - sum(exp(other[token]) for token in sorted(common)))
    total = sum(exp(dense[token]) * (dense[token] - other[token]) for token in sorted(common))
    if p_rest > _SMALLEST:
        total += p_rest * log(p_rest / q_rest)
    return max(0.0, total), max(0.0, 1.0 - sum(exp(value) for value in dense.values()))
