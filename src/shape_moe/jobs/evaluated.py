"""What an evaluation found out, model by model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shape_moe.evaluation.faithfulness import Faithfulness
from shape_moe.evaluation.footprint import Footprint
from shape_moe.evaluation.forgotten import Forgotten
from shape_moe.evaluation.judge import Verdict as SetFigures
from shape_moe.evaluation.measures import Figures, Groups, document, worst_group
from shape_moe.evaluation.task_results import TaskResult
from shape_moe.evaluation.verdict import Verdict
from shape_moe.selection.selection import Selection

TASK, ALSO = "task", "also"
"""The sets of examples: what the pruned models were made for, and something else."""


@dataclass
class Evaluated:
    """Everything that was found out about one model.

    Attributes:
        name: what the user called it.
        kind: ``dense``, ``mask`` (a selection on the dense model) or ``checkpoint``.
        selection: what it keeps, None for the dense model and for checkpoints of other tools.
        size: bytes of its weights; of a mask, what its checkpoint would have.
        sets: figures by set, ``task`` and perhaps ``also``.
        classes: figures over the task's examples by class, empty where no classes were asked for.
        tasks: results of lm-evaluation-harness by task.
        task_changes: paired differences to the dense model by task and metric, None for the dense model itself.
        verdict: what pruning did to the model, over the task's examples; None for the dense model itself.
        forgotten: what became of general prompts, None where they were not asked.
        footprint: memory and speed, None where they were not measured (a mask has the dense model's).
    """

    name: str
    kind: str
    selection: Selection | None
    size: int
    sets: dict[str, SetFigures] = field(default_factory=dict)
    classes: Groups = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    task_changes: dict[str, Figures] | None = None
    verdict: Verdict | None = None
    forgotten: Forgotten | None = None
    footprint: Footprint | None = None

    def to_document(self, by: str | None) -> dict[str, Any]:
        """For JSON; ``by`` is the field whose values are the classes."""
        chosen, changes = self.selection, self.task_changes
        keys = ("scorer", "rule", "routing", "keep")
        return {
            "name": self.name,
            "kind": self.kind,
            "selection": {key: getattr(chosen, key) for key in keys} if chosen else None,
            "bytes": self.size,
            "sets": {name: figures.to_document() for name, figures in self.sets.items()},
            "classes": self._classes(by) if by else None,
            "tasks": {name: result.to_document() for name, result in self.tasks.items()},
            "task_items": {name: result.items for name, result in self.tasks.items()},
            "task_changes": None if changes is None else {name: document(found) for name, found in changes.items()},
            "verdict": self.verdict.to_document() if self.verdict else None,
            "forgotten": self.forgotten.to_document() if self.forgotten else None,
            "footprint": self.footprint.to_document() if self.footprint else None,
        }

    def _classes(self, by: str) -> dict[str, Any] | None:
        worst = worst_group(self.classes)
        if worst is None:
            return None
        found = {name: {key: document(entry) for key, entry in group.items()} for name, group in self.classes.items()}
        return {"field": by, "worst": worst[0], "by": found}


@dataclass(frozen=True)
class Evaluation:
    """The result: models in the order given, the dense one first.

    Attributes:
        models: the models.
        faithfulness: one entry per selection, empty where it was not asked for.
        document: what the JSON file holds.
        notes: what the user should know.
    """

    models: tuple[Evaluated, ...]
    faithfulness: tuple[Faithfulness, ...]
    document: dict[str, Any]
    notes: tuple[str, ...] = ()
