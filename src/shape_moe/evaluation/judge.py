"""One judge per held-out set: the dense model's answers, and every other model's beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shape_moe.evaluation import measures
from shape_moe.evaluation.dense_reference import DenseReference
from shape_moe.evaluation.generation import Generated, GenerationOptions, generate
from shape_moe.evaluation.held_out import HeldOutSet
from shape_moe.evaluation.intervals import Bootstrap
from shape_moe.evaluation.measures import Figures, Groups, Health
from shape_moe.evaluation.teacher_forced import TeacherForced, compare_with_dense, record_dense
from shape_moe.progress import Advance
from shape_moe.selection.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Verdict:
    """Figures of one model over one set.

    Attributes:
        quality: see :func:`shape_moe.evaluation.measures.quality`.
        change: paired differences to the dense model, empty for the dense model itself.
        health: free-running answers, None where none were made.
    """

    quality: Figures
    change: Figures = field(default_factory=dict)
    health: Health | None = None

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "quality": measures.document(self.quality),
            "change": measures.document(self.change) or None,
            "generation": self.health.to_document() if self.health else None,
        }

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Verdict:
        """What :meth:`to_document` described."""
        answers = found.get("generation")
        return cls(
            measures.figures_of(found["quality"]),
            measures.figures_of(found.get("change")),
            Health.from_document(answers) if answers else None,
        )


class Judge:
    """Judges models beside the dense one over one set of held-out examples.

    Args:
        model: the dense model; its answers are recorded at once.
        tokenizer: its tokenizer.
        held_out: the examples.
        generation: how to let models answer freely, None for not at all.
        seed: draws the resamples of all intervals.
        comparisons: how many candidates the best is picked from.
        advance: called with the number of examples that the dense model has done.

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
        seed: int = 0,
        comparisons: int = 1,
        advance: Advance = lambda _: None,
    ) -> None:
        self.tokenizer, self.held_out, self.generation = tokenizer, held_out, generation
        self.reference = DenseReference()
        self.dense = record_dense(model, held_out, self.reference, advance)
        self.answered = held_out.answered()
        self.draws = Bootstrap(len(held_out.examples), seed, comparisons)
        self._dense_answers: Generated | None = None

    def close(self) -> None:
        """Let go of what the dense model said."""
        self.reference.close()

    def compare(self, model: PreTrainedModel, advance: Advance = lambda _: None) -> TeacherForced:
        """Teacher-forced sums of another model."""
        return compare_with_dense(model, self.held_out, self.reference, advance)

    def compare_masked(self, model: PreTrainedModel, selection: Selection) -> TeacherForced:
        """Teacher-forced sums of the dense model with a selection applied as a mask."""
        from shape_moe.pruning.masks import masked

        with masked(model, selection):
            return self.compare(model)

    def answer_as_dense(self, model: PreTrainedModel) -> Generated | None:
        """Let the dense model answer, once; None where nothing is generated."""
        if self._dense_answers is None and self.generation is not None and self.answered:
            self._dense_answers = generate(model, self.tokenizer, self.held_out, self.generation)
        return self._dense_answers

    def answer(self, model: PreTrainedModel) -> Generated | None:
        """Let another model answer; None where nothing is generated."""
        if self.generation is None or not self.answered:
            return None
        return generate(model, self.tokenizer, self.held_out, self.generation)

    def answer_masked(self, model: PreTrainedModel, selection: Selection) -> Generated | None:
        """Let the dense model with a selection applied as a mask answer."""
        from shape_moe.pruning.masks import masked

        with masked(model, selection):
            return self.answer(model)

    def by_answers(self, sums: TeacherForced, made: Generated) -> TeacherForced:
        """Sums whose exact match is that of written answers; examples that were not answered count as wrong."""
        exact = np.zeros(len(sums.exact), dtype=bool)
        exact[list(made.positions)] = made.exact
        return replace(sums, exact=exact)

    def judge_dense_by_answers(self, model: PreTrainedModel) -> None:
        """Let the dense model answer, and take its exact match from what it wrote."""
        made = self.answer_as_dense(model)
        if made is not None:
            self.dense = self.by_answers(self.dense, made)

    def dense_verdict(self) -> Verdict:
        """Figures of the dense model itself."""
        made = self._dense_answers
        return Verdict(
            measures.quality(self.dense, self.draws, self.answered),
            health=measures.health(made, None, self.draws) if made else None,
        )

    def verdict(self, sums: TeacherForced, made: Generated | None = None) -> Verdict:
        """Figures of another model, beside the dense one."""
        return Verdict(
            measures.quality(sums, self.draws, self.answered),
            measures.change(sums, self.dense, self.draws, self.answered),
            measures.health(made, self._dense_answers, self.draws) if made else None,
        )

    def by_group(self, sums: TeacherForced) -> Groups:
        """Figures of another model for every class of examples by itself, where examples have classes."""
        return measures.by_group(self.held_out, sums, self.dense, self.draws)
