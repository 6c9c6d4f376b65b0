"""What an evaluation found out, model by model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from shape_moe.evaluation.faithfulness import Faithfulness
from shape_moe.evaluation.footprint import Footprint
from shape_moe.evaluation.forgotten import Forgotten
from shape_moe.evaluation.measures import Figures, Groups, Measured, document, figures_of, worst_group
from shape_moe.evaluation.result_file import header, read_result
from shape_moe.evaluation.task_results import TaskResult
from shape_moe.evaluation.verdict import Verdict
from shape_moe.made_with import MadeWith
from shape_moe.selection.selection import Selection
from shape_moe.units import counted

TASK, ALSO = "task", "also"
"""The sets of examples: what the pruned models were made for, and something else."""
EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Chosen:
    """What a document says of a selection; layers and experts are None in one that an earlier build wrote."""

    scorer: str
    rule: str
    routing: str
    keep: float
    gate_scale: str = "survivors"
    num_layers: int | None = None
    num_experts: int | None = None

    @classmethod
    def of(cls, chosen: Selection | Chosen) -> Chosen:
        """What is told of a selection."""
        if isinstance(chosen, Chosen):
            return chosen
        told = {entry.name: getattr(chosen, entry.name) for entry in fields(cls) if entry.name != "num_layers"}
        return cls(**told, num_layers=len(chosen.layers))

    @property
    def shape(self) -> str:
        """The model's layers and experts in words; empty where they are not known."""
        if not (self.num_layers and self.num_experts):
            return ""
        return f"{counted(self.num_layers, 'layer')} of {counted(self.num_experts, 'expert')}"


_CHOSEN = tuple(entry.name for entry in fields(Chosen))


@dataclass
class Evaluated:
    """Everything that was found out about one model.

    Attributes:
        name: what the user called it.
        kind: ``dense``, ``mask`` (a selection on the dense model) or ``checkpoint``.
        selection: what it keeps, None for the dense model and for checkpoints of other tools.
        size: bytes of its weights; of a mask, what its checkpoint would have; None where they are not known.
        sets: what was measured by set, ``task`` and perhaps ``also``.
        classes: figures over the task's examples by class, empty where no classes were asked for.
        tasks: results of lm-evaluation-harness by task.
        task_changes: paired differences to the dense model by task and metric, None for the dense model itself.
        footprint: memory and speed, None where they were not measured (a mask has the dense model's).
        verdict: what pruning did to the model, over the task's examples; None for the dense model itself.
        forgotten: what became of general prompts, None where they were not asked.
    """

    name: str
    kind: str
    selection: Selection | Chosen | None
    size: int | None
    sets: dict[str, Measured] = field(default_factory=dict)
    classes: Groups = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    task_changes: dict[str, Figures] | None = None
    footprint: Footprint | None = None
    verdict: Verdict | None = None
    forgotten: Forgotten | None = None

    def to_document(self, by: str | None) -> dict[str, Any]:
        """For JSON; ``by`` is the field whose values are the classes."""
        chosen, changes, worst = self.selection, self.task_changes, worst_group(self.classes)
        by_class = {
            name: {key: document(found) for key, found in group.items()} for name, group in self.classes.items()
        }
        return {
            "name": self.name,
            "kind": self.kind,
            "selection": asdict(Chosen.of(chosen)) if chosen else None,
            "bytes": self.size,
            "sets": {name: measured.to_document() for name, measured in self.sets.items()},
            "classes": {"field": by, "worst": worst[0], "by": by_class} if worst else None,
            "tasks": {name: result.to_document() for name, result in self.tasks.items()},
            "task_items": {name: result.items for name, result in self.tasks.items()},
            "task_changes": None if changes is None else {name: document(found) for name, found in changes.items()},
            "footprint": self.footprint.to_document() if self.footprint else None,
            **({"verdict": self.verdict.to_document()} if self.verdict else {}),
            **({"forgotten": self.forgotten.to_document()} if self.forgotten else {}),
        }

    @classmethod
    def from_document(cls, found: Mapping[str, Any]) -> Evaluated:
        """What :meth:`to_document` described, but for the scores of single items and the experts themselves."""
        chosen, size, footprint = found.get("selection"), found.get("bytes"), found.get("footprint")
        verdict, forgotten = found.get("verdict"), found.get("forgotten")
        classes, items, changes = (
            found.get("classes") or {"by": {}},
            found.get("task_items") or {},
            found.get("task_changes"),
        )
        return cls(
            name=str(found["name"]),
            kind=str(found["kind"]),
            selection=Chosen(**{key: chosen[key] for key in _CHOSEN if key in chosen}) if chosen else None,
            size=None if size is None else int(size),
            sets={str(name): Measured.from_document(entry) for name, entry in found["sets"].items()},
            classes={
                str(name): {key: figures_of(entry[key]) for key in ("quality", "change")}
                for name, entry in classes["by"].items()
            },
            tasks={
                str(task): TaskResult.from_document(str(task), metrics, int(items.get(task, 0)))
                for task, metrics in (found.get("tasks") or {}).items()
            },
            task_changes=None if changes is None else {str(task): figures_of(entry) for task, entry in changes.items()},
            verdict=Verdict.from_document(verdict) if verdict else None,
            forgotten=Forgotten.from_document(forgotten) if forgotten else None,
            footprint=Footprint.from_document(footprint) if footprint else None,
        )


@dataclass(frozen=True)
class Evaluation:
    """Quality, memory and speed of several models on the same examples: the content of ``evaluation.json``.

    Attributes:
        model: name of the dense model.
        fingerprint: identifies it.
        data: where the examples are from, None where tasks alone were asked for.
        also: where further examples are from, None without any.
        examples: how many examples of ``data`` were used.
        by: the field whose values are the classes, None without classes.
        models: the models in the order given, the dense one first.
        faithfulness: one entry per selection, empty where it was not asked for.
        notes: what the user should know.
        made_with: seed, versions and command.
    """

    model: str
    fingerprint: str | None
    data: str | None
    also: str | None
    examples: int
    by: str | None
    models: tuple[Evaluated, ...]
    faithfulness: tuple[Faithfulness, ...]
    notes: tuple[str, ...]
    made_with: MadeWith

    @property
    def document(self) -> dict[str, Any]:
        """For JSON."""
        return self.to_document()

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong with free answers, of every model on every set."""
        sources = {TASK: self.data, ALSO: self.also}
        return tuple(
            f"{model.name}, {sources.get(name) or name}: {complaint}."
            for model in self.models
            for name, measured in model.sets.items()
            for complaint in (measured.health.complaints if measured.health is not None else ())
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that a user must not miss: complaints first."""
        return tuple(dict.fromkeys((*self.complaints, *self.notes)))

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **header("evaluate"),
            "model": self.model,
            "fingerprint": self.fingerprint,
            "data": self.data,
            "also": self.also,
            "examples": self.examples,
            **self.made_with.to_document(),
            "models": [found.to_document(self.by) for found in self.models],
            "faithfulness": [check.to_document() for check in self.faithfulness],
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Evaluation:
        """What :meth:`to_document` described."""
        fields = [classes["field"] for entry in document["models"] if (classes := entry.get("classes"))]
        data, also = (document.get(key) for key in ("data", "also"))
        found = cls(
            model=str(document["model"]),
            fingerprint=document.get("fingerprint"),
            data=None if data is None else str(data),
            also=None if also is None else str(also),
            examples=int(document.get("examples") or 0),
            by=str(fields[0]) if fields else None,
            models=tuple(Evaluated.from_document(entry) for entry in document["models"]),
            faithfulness=tuple(Faithfulness.from_document(entry) for entry in document.get("faithfulness") or ()),
            notes=(),
            made_with=MadeWith.from_document(document),
        )
        complaints = set(found.complaints)  # they are written beside the notes, and are known from the models
        notes = (str(text) for text in document.get("warnings") or ())
        return replace(found, notes=tuple(text for text in notes if text not in complaints))


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation's folder or its ``evaluation.json``.

    Raises:
        CheckpointError: when there is no such file, or it is not JSON.
        DataError: when it is not an evaluation of this format version; the message says what is wrong.
    """
    return read_result(path, EVALUATION_FILE, "evaluate", Evaluation.from_document)
