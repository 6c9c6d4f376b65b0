"""The canary: token sequences with the masked original's log-probabilities, so that any server can be checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shape_moe.architectures.loading import input_device, vocabulary_size
from shape_moe.documents import as_shape
from shape_moe.errors import CheckpointError
from shape_moe.json_file import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT_VERSION = 1
SEQUENCES = 16
SEQUENCE_LENGTH = 64
TOP = 20
_LEAST_TEXT = 8
"""Tokens that every passage must give at least; a tokenizer that gives fewer does not know such text."""


@dataclass(frozen=True)
class CanarySequence:
    """One sequence.

    Attributes:
        tokens: token ids.
        top_ids: at every position, the most likely next tokens, best first.
        top_logprobs: their log-probabilities (natural).
    """

    tokens: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


@dataclass(frozen=True)
class Canary:
    """Sequences and answers of a model, and the dtype in which they were computed."""

    dtype: str
    sequences: list[CanarySequence]

    def save(self, file: Path) -> None:
        """Write the canary."""
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        file.write_text(json.dumps(document) + "\n", encoding="utf-8")


def load_canary(file: Path) -> Canary:
    """Read a canary file.

    Raises:
        CheckpointError: when it is missing or damaged.
    """
    document = read_json(file)
    if document.pop("format_version", None) != FORMAT_VERSION:
        raise CheckpointError(f"{file} is not a canary file, or was written in another format version.")
    canary = as_shape(document, Canary, file, "a canary file")
    for sequence in canary.sequences:
        top, values = sequence.top_ids, sequence.top_logprobs
        same = [len(ids) for ids in top] == [len(row) for row in values] and len(top) == len(sequence.tokens) > 0
        if not same or not all(top) or min(*sequence.tokens, *(min(ids) for ids in top)) < 0:
            raise CheckpointError(f"{file} is not a canary file: tokens and answers do not fit each other.")
    if not canary.sequences:
        raise CheckpointError(f"{file} is not a canary file: it has no sequence.")
    return canary


def canary_texts() -> list[str]:
    """The neutral passages that canaries begin with: prose, code, data, arithmetic, seven languages, dialogue."""
    texts: list[str] = json.loads(files("shape_moe.pruning").joinpath("canary_texts.json").read_text(encoding="utf-8"))
    return texts


def canary_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """The sequences to ask: neutral text that comes with this package, each continued by the model itself.

    Nothing of the calibration set enters, because a canary travels with a published model. Without a tokenizer, token
    ids are drawn from a fixed seed.

    Args:
        model: the original, which continues the text greedily.
        tokenizer: its tokenizer, None where there is none.

    Returns:
        :data:`SEQUENCES` sequences of at most :data:`SEQUENCE_LENGTH` token ids.
    """
    vocabulary = vocabulary_size(model)
    texts = [list(tokenizer(text).input_ids) for text in canary_texts()] if tokenizer is not None else []
    length = min((len(ids) for ids in texts), default=0)
    if length < _LEAST_TEXT or max(max(ids) for ids in texts) >= vocabulary:
        return random_tokens(vocabulary)
    return _continued(model, [ids[: min(length, SEQUENCE_LENGTH // 2)] for ids in texts])


def random_tokens(vocabulary: int) -> list[list[int]]:
    """Sequences for a model of which no text is known: token ids drawn from a fixed seed."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocabulary, size=(SEQUENCES, SEQUENCE_LENGTH)).tolist()  # type: ignore[no-any-return]


def _continued(model: PreTrainedModel, rows: list[list[int]]) -> list[list[int]]:
    """Rows of equal length, continued to :data:`SEQUENCE_LENGTH` tokens by the most likely next one."""
    import torch

    ids = torch.tensor(rows, device=input_device(model))
    step, past = ids, None
    with torch.no_grad():
        while ids.shape[1] < SEQUENCE_LENGTH:
            output = model(input_ids=step, past_key_values=past, use_cache=True)
            step, past = output.logits[:, -1:].argmax(-1).to(ids.device), output.past_key_values
            ids = torch.cat([ids, step], dim=1)
    continued: list[list[int]] = ids.tolist()
    return continued


def record_canary(model: PreTrainedModel, tokens: list[list[int]]) -> Canary:
    """Run a model over sequences and keep its best next tokens at every position.

    Raises:
        CheckpointError: when the model's logits are not finite.
    """
    sequences = []
    for row in tokens:
        logprobs = _logprobs(model, row)
        if not bool(logprobs.isfinite().all()):
            raise CheckpointError(
                "The original's logits under the mask are not finite: it has NaN or infinite weights."
            )
        best = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
        values = [[round(value, 6) for value in position] for position in best.values.tolist()]
        sequences.append(CanarySequence(list(row), best.indices.tolist(), values))
    return Canary(str(model.dtype).removeprefix("torch."), sequences)


def _logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    import torch

    with torch.no_grad():
        ids = torch.tensor([tokens], device=input_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[0]
    logprobs: torch.Tensor = logits.float().log_softmax(-1).cpu()
    return logprobs


@dataclass(frozen=True)
class CanaryResult:
    """How far a model's answers are from the canary's.

    Attributes:
        largest_difference: largest absolute difference of a log-probability among the canary's top tokens.
        mean_kl: mean KL divergence from the canary's distribution, its top tokens renormalised.
        top1_agreement: share of positions at which the canary's best next token is the best, ties included.
        positions: positions compared.
    """

    largest_difference: float
    mean_kl: float
    top1_agreement: float
    positions: int

    @property
    def passed(self) -> bool:
        """Whether this is the same model, rounding apart."""
        return self.mean_kl < KL_LIMIT and self.top1_agreement >= TOP1_LIMIT


KL_LIMIT = 0.01
TOP1_LIMIT = 0.95
_TIE = 1e-6


def compare_canary(model: PreTrainedModel, canary: Canary) -> CanaryResult:
    """Ask a live model for the canary's log-probabilities and compare.

    Raises:
        CheckpointError: when the canary names tokens that the model does not have.
    """
    import torch

    vocabulary = vocabulary_size(model)
    largest = max(max(*row.tokens, *(max(ids) for ids in row.top_ids)) for row in canary.sequences)
    if largest >= vocabulary:
        raise CheckpointError(f"The canary names token {largest}, and the model has {vocabulary}: it is another's.")
    answers = []
    for sequence in canary.sequences:
        logprobs = _logprobs(model, sequence.tokens)
        found = logprobs.gather(-1, torch.tensor(sequence.top_ids))
        answers.append((found.tolist(), logprobs.amax(-1).tolist()))
    return judge(canary, answers)


def judge(canary: Canary, answers: Sequence[tuple[Any, list[float]]]) -> CanaryResult:
    """Compare answers: per sequence the log-probabilities [T, top] of the canary's tokens, and the largest ones [T]."""
    import numpy as np

    worst, kl, agree, positions = 0.0, 0.0, 0, 0
    for sequence, (logprobs, best) in zip(canary.sequences, answers, strict=True):
        expected, found = np.asarray(sequence.top_logprobs), np.asarray(logprobs, dtype=np.float64)
        worst = max(worst, float(np.abs(expected - found).max()))
        p, q = _normalised(expected), _normalised(found)
        kl += float((np.exp(p) * (p - q)).sum())
        agree += int((found[:, 0] >= np.asarray(best) - _TIE).sum())
        positions += len(best)
    return CanaryResult(worst, kl / positions, agree / positions, positions)


def _normalised(logprobs: Any) -> Any:
    import numpy as np

    return logprobs - np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
