"""Results of the verbs sweep and evaluate, read from their files and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shape_moe.errors import DataError
from shape_moe.evaluation.intervals import Estimate
from shape_moe.json_file import read_json
from shape_moe.selection.selection import Selection

FORMAT_VERSION = 1
FOOTPRINT = ("load_seconds", "peak_bytes", "prefill_tokens_per_second", "decode_tokens_per_second")
"""What an evaluation measures of memory and speed."""
SWEEP_FILE = "sweep.json"
EVALUATION_FILE = "evaluation.json"
Result = TypeVar("Result")


Measures = Mapping[str, Estimate]
"""Estimates by metric."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one model on one set.

    Attributes:
        quality: ``nll``, ``perplexity``, ``kl``, ``top1`` and perhaps ``exact_match``.
        change: differences to the dense model (``perplexity`` as a ratio), empty for the dense model itself.
        generation: ``loop_rate``, ``no_end_rate``, ``length`` and perhaps ``exact_match``; empty where nothing was
            generated.
    """

    quality: Measures
    change: Measures
    generation: Measures


@dataclass(frozen=True)
class SweepPoint:
    """One selection of a sweep.

    Attributes:
        scorer: how experts were valued.
        rule: how layers shared the budget.
        routing: ``drop`` or ``reroute``.
        target: ``ragged`` or ``stock``.
        keep: keep rate met.
        kept: experts kept.
        size: bytes of weights, None where unknown.
        measured: its quality.
        meets_limit: whether it is within the limit, None without one.
        healthy: whether free-running answers are like the dense model's, None where none were generated.
        fits: whether it fits the device, None where none was named.
    """

    scorer: str
    rule: str
    routing: str
    target: str
    keep: float
    kept: int
    size: int | None
    measured: Measured
    meets_limit: bool | None
    healthy: bool | None
    fits: bool | None

    @property
    def method(self) -> str:
        """Scorer, rule and routing, and the target where it is not the usual one."""
        target = f", {self.target}" if self.target != "ragged" else ""
        return f"{self.scorer}, {self.rule}, {self.routing}{target}"

    @property
    def good(self) -> bool:
        """Whether nothing speaks against it."""
        return False not in {self.meets_limit, self.healthy, self.fits}


@dataclass(frozen=True)
class Sweep:
    """Quality over keep rates.

    Attributes:
        model: name of the model.
        fingerprint: identifies it.
        split: what was measured on, a sentence.
        limit: kind (``max_kl`` or ``max_drop``) and value of the limit, None without one.
        dense: the unpruned model.
        dense_size: its bytes.
        points: the selections.
        recommended: position of the recommended one, None where none is.
        smallest_within_limit: position of the smallest one within the limit.
        reason: why, a sentence.
        versions: package versions.
        seed: of the run.
        command: that made it.
    """

    model: str
    fingerprint: str | None
    split: str
    limit: tuple[str, float] | None
    dense: Measured
    dense_size: int | None
    points: tuple[SweepPoint, ...]
    recommended: int | None
    smallest_within_limit: int | None
    reason: str
    versions: Mapping[str, str]
    seed: int | None
    command: str

    def point_of(self, selection: Selection | None) -> SweepPoint | None:
        """The point that is this selection, None where there is none; the recommended one for no selection."""
        if selection is None:
            return self.points[self.recommended] if self.recommended is not None else None
        wanted = (selection.scorer, selection.rule, selection.routing, selection.kept)
        same = [p for p in self.points if (p.scorer, p.rule, p.routing, p.kept) == wanted]
        return same[0] if same else None


@dataclass(frozen=True)
class EvaluatedModel:
    """One model of an evaluation.

    Attributes:
        name: what it is called.
        kind: ``dense``, ``mask`` or ``checkpoint``.
        selection: ``scorer``, ``rule``, ``routing`` and ``keep``, empty for the dense model.
        size: bytes of weights, None where unknown.
        sets: what was measured, by set: ``task`` and perhaps ``also``.
        classes: the field that divides the task into classes, the worst class, and what was measured by class.
        tasks: benchmark results: metrics by task.
        footprint: memory and speed, see :data:`FOOTPRINT`; empty where they were not measured.
        device: where those were measured.
    """

    name: str
    kind: str
    selection: Mapping[str, Any]
    size: int | None
    sets: Mapping[str, Measured]
    classes: tuple[str, str, Mapping[str, Measured]] | None
    tasks: Mapping[str, Measures]
    footprint: Mapping[str, float]
    device: str | None


@dataclass(frozen=True)
class Faithfulness:
    """A selection beside its controls, which keep as many experts per layer: the worst ones, and random ones."""

    selection: str
    kept: Measured
    inverted: Measured
    random: tuple[Measured, ...]


@dataclass(frozen=True)
class Evaluation:
    """Quality, memory and speed of several models on the same examples."""

    model: str
    data: str
    seed: int | None
    versions: Mapping[str, str]
    models: tuple[EvaluatedModel, ...]
    faithfulness: tuple[Faithfulness, ...]
    warnings: tuple[str, ...]
    fingerprint: str | None
    command: str


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's folder or its ``sweep.json``.

    Raises:
        CheckpointError: when there is no such file, or it is not JSON.
        DataError: when it is not a sweep of this format version; the message says what is wrong.
    """
    return _read(path, SWEEP_FILE, "sweep", _sweep)


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation's folder or its ``evaluation.json``.

    Raises:
        CheckpointError: when there is no such file, or it is not JSON.
        DataError: when it is not an evaluation of this format version; the message says what is wrong.
    """
    return _read(path, EVALUATION_FILE, "evaluate", _evaluation)


def _read(path: Path, name: str, verb: str, build: Callable[[dict[str, Any]], Result]) -> Result:
    file = path / name if path.is_dir() else path
    document = read_json(file)
    if document.get("format_version") != FORMAT_VERSION or document.get("verb") != verb:
        raise DataError(f"{file} is not a result of shape-moe {verb}, or was written in another format version.")
    try:
        return build(document)
    except KeyError as error:
        raise DataError(f"{file} is damaged: {error.args[0]!r} is missing.") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{file} is damaged: {error}.") from error


def _sweep(document: dict[str, Any]) -> Sweep:
    points = tuple(_point(entry) for entry in document["points"])
    places = [document.get(key) for key in ("recommended", "smallest_within_limit")]
    for place in places:
        if place is not None and not 0 <= int(place) < len(points):
            raise ValueError(f"there is no point {place}")
    limit, dense = document.get("limit"), document["dense"]
    return Sweep(
        model=str(document["model"]),
        fingerprint=document.get("fingerprint"),
        split=str(document.get("split") or ""),
        limit=(str(limit["kind"]), float(limit["value"])) if limit else None,
        dense=_measured(dense),
        dense_size=_whole(dense.get("bytes")),
        points=points,
        recommended=_whole(places[0]),
        smallest_within_limit=_whole(places[1]),
        reason=str(document.get("reason") or ""),
        versions=_texts(document.get("versions")),
        seed=_whole(document.get("seed")),
        command=str(document.get("command") or ""),
    )


def _point(entry: dict[str, Any]) -> SweepPoint:
    return SweepPoint(
        scorer=str(entry["scorer"]),
        rule=str(entry["rule"]),
        routing=str(entry["routing"]),
        target=str(entry.get("target") or "ragged"),
        keep=float(entry["keep"]),
        kept=int(entry["kept"]),
        size=_whole(entry.get("bytes")),
        measured=_measured(entry),
        meets_limit=_truth(entry.get("meets_limit")),
        healthy=_truth(entry.get("healthy")),
        fits=_truth(entry.get("fits")),
    )


def _evaluation(document: dict[str, Any]) -> Evaluation:
    return Evaluation(
        model=str(document["model"]),
        data=str(document.get("data") or ""),
        seed=_whole(document.get("seed")),
        versions=_texts(document.get("versions")),
        models=tuple(_model(entry) for entry in document["models"]),
        faithfulness=tuple(_faithfulness(entry) for entry in document.get("faithfulness") or []),
        warnings=tuple(str(text) for text in document.get("warnings") or []),
        fingerprint=document.get("fingerprint"),
        command=str(document.get("command") or ""),
    )


def _model(entry: dict[str, Any]) -> EvaluatedModel:
    classes, footprint = entry.get("classes"), entry.get("footprint") or {}
    device = footprint.get("device")
    return EvaluatedModel(
        name=str(entry["name"]),
        kind=str(entry["kind"]),
        selection=dict(entry.get("selection") or {}),
        size=_whole(entry.get("bytes")),
        sets={str(name): _measured(measured) for name, measured in entry["sets"].items()},
        classes=_classes(classes) if classes else None,
        tasks={str(task): _measures(metrics) for task, metrics in (entry.get("tasks") or {}).items()},
        footprint={name: float(footprint[name]) for name in FOOTPRINT if footprint.get(name) is not None},
        device=str(device) if device is not None else None,
    )


def _classes(entry: dict[str, Any]) -> tuple[str, str, Mapping[str, Measured]]:
    by_class = {str(name): _measured(measured) for name, measured in entry["by"].items()}
    return str(entry["field"]), str(entry["worst"]), by_class


def _faithfulness(entry: dict[str, Any]) -> Faithfulness:
    controls = tuple(_measured(control) for control in entry["random"])
    return Faithfulness(str(entry["selection"]), _measured(entry["kept"]), _measured(entry["inverted"]), controls)


def _measured(entry: dict[str, Any]) -> Measured:
    return Measured(_measures(entry["quality"]), _measures(entry.get("change")), _measures(entry.get("generation")))


def _measures(entry: dict[str, Any] | None) -> Measures:
    """The estimates among an object's values; what is no estimate (a limit, a note) is left out."""
    found = {}
    for name, value in (entry or {}).items():
        if isinstance(value, dict) and value.get("value") is not None:
            found[str(name)] = Estimate.from_document(value)
    return found


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _truth(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _texts(entry: dict[str, Any] | None) -> dict[str, str]:
    return {str(name): str(value) for name, value in (entry or {}).items()}
