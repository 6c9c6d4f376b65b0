"""Evaluations of an experiment on one loaded model: what they share, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from shape_moe.evaluation.harness import run_tasks
from shape_moe.evaluation.measures import document
from shape_moe.evaluation.task_results import TaskResult, task_changes
from shape_moe.experiments.config import TaskSpec
from shape_moe.pruning.masks import masked
from shape_moe.selection.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Document = dict[str, Any]


class OpenEvaluation(Protocol):
    """An evaluation that is ready to judge selections as masks: a bench of held-out examples, or a task."""

    def dense_document(self) -> Document:
        """Figures of the dense model."""

    def document(self, selection: Selection) -> Document:
        """Figures of the model with a selection as a mask, and their change to the dense model's."""

    def close(self) -> None:
        """Let go of what judging needed."""


class JudgedTask:
    """An evaluation by a task of lm-evaluation-harness.

    Args:
        spec: the evaluation.
        model: the dense model.
        tokenizer: its tokenizer.
        seed: draws few-shot examples, and the resamples of paired differences.
        known: what :meth:`dense_document` of an earlier run gave, None where the dense model is still to be asked.

    Raises:
        ShapeMoeError: when lm-eval is missing or cannot run the task.
    """

    def __init__(
        self,
        spec: TaskSpec,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        known: Mapping[str, Any] | None,
    ) -> None:
        self.spec, self.model, self.tokenizer, self.seed = spec, model, tokenizer, seed
        self._dense = (
            self._run()
            if known is None
            else {name: TaskResult.from_items(found) for name, found in known["results"].items()}
        )

    def dense_document(self) -> Document:
        """Figures of the dense model; ``results`` is what later runs need to pair items."""
        return {
            "tasks": {name: result.to_document() for name, result in self._dense.items()},
            "change": None,
            "items": {name: result.items for name, result in self._dense.items()},
            "versions": {name: result.task_version for name, result in self._dense.items()},
            "results": {name: result.to_items() for name, result in self._dense.items()},
        }

    def document(self, selection: Selection) -> Document:
        """Figures of a selection."""
        with masked(self.model, selection):
            made = self._run()
        changes = {name: task_changes(result, self._dense[name], seed=self.seed) for name, result in made.items()}
        return {
            "tasks": {name: result.to_document() for name, result in made.items()},
            "change": {name: document(found) for name, found in changes.items()},
        }

    def close(self) -> None:
        """Nothing is held."""

    def _run(self) -> dict[str, TaskResult]:
        return run_tasks(
            self.model,
            self.tokenizer,
            self.spec.options,
            batch_size=self.spec.batch_size,
            seed=self.seed,
        )
