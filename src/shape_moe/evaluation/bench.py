"""The bench: a dense model's answers to held-out examples, and every other model's beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shape_moe.evaluation.comparison import Comparison
from shape_moe.evaluation.dense_reference import DenseReference
from shape_moe.evaluation.generation import Generated, GenerationOptions, generate
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.teacher_forced import TeacherForced, compare_with_dense, record_dense
from shape_moe.progress import SILENT, Advance, Progress
from shape_moe.selection.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Bench(Comparison):
    """Judges selections (as masks on the dense model) and other models beside the dense one, over one set.

    Args:
        model: the dense model; its answers are recorded at once.
        tokenizer: its tokenizer.
        held_out: the examples.
        generation: how to let models answer freely, None for not at all.
        by_answers: take exact match from free answers to all examples instead of likelihoods: where only a part of an
            answer must be right, that part has to be written.
        seed: draws the resamples of all intervals.
        comparisons: how many candidates the best is picked from.
        folder: where judged selections are kept for a later run, None for nowhere.
        progress: where to show progress.

    Raises:
        ShapeMoeError: when the dense model's logits are not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        held_out: HeldOutSet,
        *,
        generation: GenerationOptions | None = None,
        by_answers: bool = False,
        seed: int = 0,
        comparisons: int = 1,
        folder: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        super().__init__(held_out, seed=seed, comparisons=comparisons, folder=folder, progress=progress)
        self._model: PreTrainedModel | None = model
        self.tokenizer, self.by_answers = tokenizer, by_answers
        count = len(held_out.examples)
        self.generation = generation if self.answered else None
        if by_answers and self.generation is not None:
            self.generation = replace(self.generation, examples=count)
        self.reference = DenseReference()
        self._answers: dict[str, Generated | None] = {}
        with progress.phase(f"Dense model on {held_out.name}", count, "example") as advance:
            began = time.perf_counter()
            said = record_dense(model, held_out, self.reference, advance)
            self.seconds = time.perf_counter() - began
        self._dense_sums = self._by_answers(said, self.dense_answers if by_answers else None)

    @property
    def dense_sums(self) -> TeacherForced:
        """Teacher-forced sums of the dense model."""
        return self._dense_sums

    def close(self) -> None:
        """Let go of what the dense model said."""
        self.reference.close()

    def unload(self) -> None:
        """Let go of the dense model itself, once it has answered; other models can still be judged."""
        _ = self.dense_answers
        self._model = None

    @cached_property
    def dense_answers(self) -> Generated | None:
        """The dense model's free answers, made once; None where nothing is generated."""
        assert self._model is not None
        return self._answer(self._model)

    def sums(self, subject: Selection | PreTrainedModel, advance: Advance = lambda _: None) -> TeacherForced:
        """Teacher-forced sums; those of a selection are made once, and found again by a later run."""
        key = subject.digest if isinstance(subject, Selection) else ""
        if key in self._sums:
            advance(len(self.held_out.examples))
            return TeacherForced.from_items(self._sums[key])
        with self._live(subject) as model:
            sums = compare_with_dense(model, self.held_out, self.reference, advance)
        sums = self._by_answers(sums, self.answers(subject) if self.by_answers else None)
        if key:
            self._sums.put(key, sums.to_items())
        return sums

    def answers(self, subject: Selection | PreTrainedModel) -> Generated | None:
        """Free answers, those of a selection made once; None where nothing is generated."""
        key = subject.digest if isinstance(subject, Selection) else ""
        if key in self._answers:
            return self._answers[key]
        with self._live(subject) as model:
            made = self._answer(model)
        if key:
            self._answers[key] = made
        return made

    def _answer(self, model: PreTrainedModel) -> Generated | None:
        return generate(model, self.tokenizer, self.held_out, self.generation) if self.generation else None

    @contextmanager
    def _live(self, subject: Selection | PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The model to run: another one as it is, or the dense one under a mask."""
        if not isinstance(subject, Selection):
            yield subject
            return
        from shape_moe.pruning.masks import masked

        assert self._model is not None
        with masked(self._model, subject) as model:
            yield model

    def _by_answers(self, sums: TeacherForced, made: Generated | None) -> TeacherForced:
        """Sums whose exact match is that of written answers; examples that were not answered count as wrong."""
        if made is None:
            return sums
        exact = np.zeros(len(sums.exact), dtype=bool)
        exact[list(made.positions)] = made.exact
        return replace(sums, exact=exact)
