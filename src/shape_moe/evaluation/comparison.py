"""Figures of selections and other models beside the dense model's, over one held-out set, however they are come by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shape_moe.evaluation import measures
from shape_moe.evaluation.generation import Generated
from shape_moe.evaluation.held_out_set import HeldOutSet
from shape_moe.evaluation.intervals import Bootstrap, Estimate
from shape_moe.evaluation.measures import Groups, Measured
from shape_moe.evaluation.teacher_forced import TeacherForced
from shape_moe.evaluation.worst_class import WorstClass
from shape_moe.journal import Journal
from shape_moe.progress import Advance, Progress
from shape_moe.selection.selection import Selection
from shape_moe.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POINTS_FILE = "points.jsonl"
"""Sums of the selections judged, while the work that they belong to is unfinished."""


class Comparison(ABC):
    """Judges selections (as masks on the dense model) and other models beside the dense one, over one set.

    Args:
        held_out: the examples.
        seed: draws the resamples of all intervals.
        comparisons: how many candidates the best is picked from.
        folder: where judged selections are kept for a later run, None for nowhere.
        progress: where to show progress.

    Attributes:
        draws: resamples of the examples.
        seconds: how long the dense model took over them; 0 where it does not run by itself.
    """

    seconds: float = 0.0

    def __init__(
        self, held_out: HeldOutSet, *, seed: int, comparisons: int, folder: Path | None, progress: Progress
    ) -> None:
        self.held_out, self.answered = held_out, held_out.answered()
        self.draws = Bootstrap(len(held_out.examples), seed, comparisons)
        self._sums: Journal[dict[str, list[Any]]] = Journal(folder and folder / POINTS_FILE, "key", "sums")
        if self._sums:
            progress.note(f"{counted(len(self._sums), 'point')} already done by the interrupted run.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of what the dense model said."""

    @abstractmethod
    def unload(self) -> None:
        """Let go of the dense model itself, once it has answered; other models can still be judged."""

    @property
    @abstractmethod
    def dense_sums(self) -> TeacherForced:
        """Teacher-forced sums of the dense model."""

    @abstractmethod
    def sums(self, subject: Selection | PreTrainedModel, advance: Advance = lambda _: None) -> TeacherForced:
        """Teacher-forced sums; those of a selection are made once, and found again by a later run.

        Raises:
            ShapeMoeError: when its logits are not finite.
            UsageError: when a selection does not fit the model.
        """

    def prepare(self, selections: Sequence[Selection]) -> None:
        """Make the sums of selections together, where that saves readings of the weights."""
        del selections

    @property
    def dense_answers(self) -> Generated | None:
        """The dense model's free answers; None where nothing is generated."""
        return None

    def answers(self, subject: Selection | PreTrainedModel) -> Generated | None:
        """Free answers, those of a selection made once; None where nothing is generated."""
        del subject
        return None

    def dense(self) -> Measured:
        """What was measured of the dense model itself."""
        made = self.dense_answers
        return Measured(
            measures.quality(self.dense_sums, self.draws, self.answered),
            health=measures.health(made, None, self.draws) if made else None,
        )

    def dense_document(self) -> dict[str, Any]:
        """The same for JSON, with how many examples it rests on."""
        made = self.dense_answers
        return {
            **self.dense().to_document(),
            "examples": len(self.held_out.examples),
            "answered": len(self.answered),
            "generated": len(made.positions) if made else 0,
        }

    def document(self, selection: Selection) -> dict[str, Any]:
        """What :meth:`judge` says of a selection, for JSON."""
        return self.judge(selection).to_document()

    def judge(
        self, subject: Selection | PreTrainedModel, *, freely: bool = True, advance: Advance = lambda _: None
    ) -> Measured:
        """Judge a selection as a mask on the dense model, or another model.

        Args:
            subject: what to judge.
            freely: let it answer freely as well, where models answer at all.
            advance: called with the number of examples done.

        Raises:
            ShapeMoeError: when its logits are not finite.
            UsageError: when a selection does not fit the model.
        """
        sums = self.sums(subject, advance)
        return self.measured(sums, self.answers(subject) if freely else None)

    def measured(self, sums: TeacherForced, made: Generated | None = None) -> Measured:
        """Figures beside the dense model's, of sums and perhaps of free answers."""
        return Measured(
            measures.quality(sums, self.draws, self.answered),
            measures.change(sums, self.dense_sums, self.draws, self.answered),
            measures.health(made, self.dense_answers, self.draws) if made else None,
        )

    def by_group(self, sums: TeacherForced) -> Groups:
        """Figures for every class of examples by itself, where examples have classes."""
        return measures.by_group(self.held_out, sums, self.dense_sums, self.draws)

    @cached_property
    def _classes(self) -> WorstClass:
        return WorstClass(self.held_out.groups, self.dense_sums.tokens, self.draws)

    def losses(self, subject: Selection) -> dict[str, float]:
        """KL divergence to the dense model in nats per token, of every class of examples."""
        return self._classes.losses(self.sums(subject).kl)

    def loss(self, subject: Selection) -> float:
        """The same of the class that loses most: what candidates are compared by."""
        return self._classes.worst(self.sums(subject).kl)

    def behind(self, subject: Selection, other: Selection) -> Estimate:
        """How much more a selection loses than another, paired, each by the class that it costs most."""
        return self._classes.behind(self.sums(subject).kl, self.sums(other).kl)

    def tied(self, subject: Selection, best: Selection) -> bool:
        """Whether a selection is no worse than another but for noise: the paired difference may be zero."""
        return self.behind(subject, best).low <= 0
