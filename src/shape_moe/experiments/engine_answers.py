"""An evaluation of an experiment by free answers alone, given by an engine that takes selections as masks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from shape_moe.evaluation.generation import Asked, Generated, GenerationOptions
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.intervals import Bootstrap
from shape_moe.evaluation.measures import Measured, health
from shape_moe.selection.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnsweringEngine(Protocol):
    """The dense model, which may wear a selection as a mask; see :mod:`shape_moe.serving.vllm.masked_engine`."""

    def masked(self, selection: Selection) -> AbstractContextManager[None]:
        """Answer as the pruned model while this lasts."""

    def answers(self, prompts: Sequence[Sequence[int]], limit: int, stops: Collection[int]) -> list[list[int]]:
        """Greedy answers, up to and with the token that ends them."""


class EngineAnswers:
    """Judges selections by their free answers to a set; likelihoods are not measured.

    Args:
        engine: what answers.
        tokenizer: the model's tokenizer.
        held_out: the examples.
        generation: which of them are answered, and how answers are judged.
        seed: draws the resamples of all intervals.
    """

    def __init__(
        self,
        engine: AnsweringEngine,
        tokenizer: PreTrainedTokenizerBase,
        held_out: HeldOutSet,
        generation: GenerationOptions,
        seed: int,
    ) -> None:
        self.engine, self.tokenizer, self.held_out = engine, tokenizer, held_out
        self.asked = Asked.of(held_out, generation)
        self.draws = Bootstrap(len(held_out.examples), seed)

    @cached_property
    def dense(self) -> Generated:
        """The dense model's answers."""
        return self._answered()

    def dense_document(self) -> dict[str, Any]:
        """Figures of the dense model."""
        return {
            **Measured({}, health=health(self.dense, None, self.draws)).to_document(),
            "examples": len(self.held_out.examples),
            "answered": len(self.held_out.answered()),
            "generated": len(self.dense.positions),
        }

    def document(self, selection: Selection) -> dict[str, Any]:
        """Figures of a selection."""
        dense = self.dense
        with self.engine.masked(selection):
            made = self._answered()
        return Measured({}, health=health(made, dense, self.draws)).to_document()

    def close(self) -> None:
        """The engine goes on to the next evaluation."""

    def _answered(self) -> Generated:
        prompts, stops = self.asked.prompts, self.held_out.stops
        written = self.engine.answers(list(prompts.values()), self.asked.limit, stops)
        return self.asked.judged(self.tokenizer, dict(zip(prompts, written, strict=True)))
