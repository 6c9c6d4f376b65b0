"""Held-out examples: which tokens of them are scored, and what answers are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shape_moe.calibration.batches import PROMPT, RESPONSE, Batch, make_batch
from shape_moe.calibration.examples import Example
from shape_moe.calibration.responses import until_stop
from shape_moe.errors import DataError

if TYPE_CHECKING:
    import torch

_TOKENS_AT_A_TIME = 2048
_LOGPROB_BYTES = 4 * 2**30


@dataclass(frozen=True)
class HeldOutSet:
    """Examples to judge a model by.

    Attributes:
        name: what to call the set.
        examples: the examples.
        groups: class of each example, None where none was asked for.
        batch_size: examples per forward pass; short ones go in larger batches.
        pad_id: token id of the padding.
        stops: ids of the tokens that end an answer.
        vocabulary: size of the vocabulary, 0 when unknown; bounds how much is computed at once.
    """

    name: str
    examples: tuple[Example, ...]
    groups: tuple[str | None, ...]
    batch_size: int
    pad_id: int = 0
    stops: frozenset[int] = frozenset()
    vocabulary: int = 0

    def __post_init__(self) -> None:
        if not any(_scored_count(example) for example in self.examples):
            raise DataError(f"{self.name} holds no token that could be scored: a response, or a text of two tokens.")

    def batches(self) -> Iterator[tuple[list[int], Batch]]:
        """Batches of examples of like length, longest first, with the positions of their rows in the set."""
        scored = [i for i, example in enumerate(self.examples) if _scored_count(example)]
        order = sorted(scored, key=lambda i: (-len(self.examples[i].tokens), i))
        while order:
            size = self.rows_of(len(self.examples[order[0]].tokens))
            rows, order = order[:size], order[size:]
            yield rows, make_batch([self.examples[i] for i in rows], rows, self.pad_id)

    def rows_of(self, length: int) -> int:
        """How many examples of a length go into one pass.

        ``batch_size``, or more of them while they are short, or fewer where log-probabilities would take too much.
        """
        wanted = max(self.batch_size, _TOKENS_AT_A_TIME // length)
        return max(1, min(wanted, _LOGPROB_BYTES // (4 * length * max(self.vocabulary, 1))))

    def answered(self) -> list[int]:
        """Positions of the examples that have a prompt and a whole response."""
        return [i for i, e in enumerate(self.examples) if e.spans and e.prompt_length > 0 and not e.truncated]

    def with_others(self, others: HeldOutSet) -> HeldOutSet:
        """These examples and behind them those of another set, to be scored together."""
        return replace(self, examples=self.examples + others.examples, groups=self.groups + others.groups)

    def response(self, position: int) -> list[int]:
        """Tokens of an example's last response up to and with the first one that ends it."""
        return until_stop(self.examples[position].response, self.stops)


def _scored_count(example: Example) -> int:
    if example.spans:
        return sum(end - max(begin, 1) for begin, end in example.spans)
    return len(example.tokens) - 1 if example.plain else 0


def scored_positions(batch: Batch) -> torch.Tensor:
    """Bool [B, T - 1]: whether the token after each position is scored.

    Scored are the tokens of responses, and of plain texts all but the first; of a prompt alone nothing is.
    """
    import torch

    segments = batch.segments.view(batch.input_ids.shape)
    targets = segments[:, 1:] == RESPONSE
    plain = torch.tensor([example.plain for example in batch.examples])[:, None]
    return targets | (plain & (segments[:, 1:] == PROMPT))
