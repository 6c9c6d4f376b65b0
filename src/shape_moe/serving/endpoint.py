"""The canary on a running server: is what answers there the checkpoint that it is said to be?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shape_moe.errors import ShapeMoeError
from shape_moe.openai_server import OpenAIServer
from shape_moe.pruning.canary import TOP, Canary, CanaryResult, CanarySequence, judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Distributions = list[dict[int, float]]
"""By position: log-probabilities of token ids."""


def ask_canary(server: OpenAIServer, model: str, canary: Canary) -> CanaryResult:
    """Send a canary's sequences to a server and compare its log-probabilities with the recorded ones.

    The sequences go out as token ids; the log-probabilities of prompt tokens come back (``prompt_logprobs``, as vLLM
    has it). A token among the canary's best that the server does not name counts with the smallest log-probability
    that it names at that position, which is the most that it can have there.

    Args:
        server: an OpenAI-compatible server.
        model: the name under which it serves the checkpoint.
        canary: sequences and answers of the masked original.

    Raises:
        ShapeMoeError: when the server does not return log-probabilities of prompt tokens.
    """
    sequences, answers = [], []
    for sequence in canary.sequences:
        body = {**_request(model, sequence.tokens), "prompt_logprobs": TOP}
        found = server.post("completions", body, _distributions)
        if len(found) != len(sequence.tokens):
            raise ShapeMoeError(
                f"The endpoint {server.base} returned log-probabilities of {len(found)} prompt tokens instead of "
                f"{len(sequence.tokens)}; it must return them for token ids (prompt_logprobs), as vLLM does."
            )
        positions = range(len(found) - 1)  # the last recorded position speaks of a token that was not sent
        ids, logprobs = sequence.top_ids[:-1], sequence.top_logprobs[:-1]
        after = [found[position + 1] for position in positions]
        rows = [[named.get(token, min(named.values())) for token in row] for named, row in zip(after, ids, strict=True)]
        sequences.append(CanarySequence(sequence.tokens[:-1], ids, logprobs))
        answers.append((rows, [max(named.values()) for named in after]))
    return judge(Canary(canary.dtype, sequences), answers)


def compare_tokens(
    server: OpenAIServer, model: str, canary: Canary, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Send a canary's sequences as text, to see whether the server tokenises as the checkpoint's tokenizer does.

    Args:
        server: an OpenAI-compatible server.
        model: the name under which it serves the checkpoint.
        canary: where the texts come from.
        tokenizer: the checkpoint's tokenizer.

    Returns:
        Texts that were sent, and how many of them the server turned into other tokens.
    """
    texts = sorted({text for s in canary.sequences if (text := str(tokenizer.decode(s.tokens))).strip()})
    different = 0
    for text in texts:
        expected = list(tokenizer(text, add_special_tokens=False).input_ids)
        body = {**_request(model, text), "prompt_logprobs": 0, "add_special_tokens": False}
        found = server.post("completions", body, _distributions)
        same = len(found) == len(expected) and all(
            token in named for token, named in zip(expected[1:], found[1:], strict=True)
        )
        different += not same
    return len(texts), different


def _request(model: str, prompt: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}


def _distributions(reply: Any) -> Distributions:
    """Log-probabilities by position of the prompt; the first position has none."""
    choice = reply["choices"][0]
    entries = choice["prompt_logprobs"] if choice.get("prompt_logprobs") is not None else reply["prompt_logprobs"]
    return [{int(token): float(entry["logprob"]) for token, entry in (named or {}).items()} for named in entries]
