"""What a sweep found out: the content of ``sweep.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shape_moe.evaluation.keep_rate import Limit, SweptPoint
from shape_moe.evaluation.measures import Measured
from shape_moe.evaluation.result_file import header, read_result
from shape_moe.made_with import MadeWith
from shape_moe.selection.selection import Selection

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """Quality over keep rates.

    Attributes:
        model: name of the model.
        fingerprint: identifies it.
        split: how calibration and held-out examples were told apart, a sentence.
        comparisons: how many methods the intervals hold for together.
        calibration: what the trace was made from.
        held_out: the source of the held-out examples, and their number.
        limit: what may be lost, None without a limit.
        dense: the unpruned model's figures.
        dense_size: its bytes, None where they are not known.
        points: the selections.
        recommended: position of the recommended one, None where none is.
        smallest_within_limit: position of the smallest one within the limit.
        reason: why, a sentence.
        made_with: seed, versions and command.
    """

    model: str
    fingerprint: str | None
    split: str
    comparisons: int
    calibration: Mapping[str, Any]
    held_out: Mapping[str, Any]
    limit: Limit | None
    dense: Measured
    dense_size: int | None
    points: tuple[SweptPoint, ...]
    recommended: int | None
    smallest_within_limit: int | None
    reason: str
    made_with: MadeWith

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **header("sweep"),
            "model": self.model,
            "fingerprint": self.fingerprint,
            "split": self.split,
            "comparisons": self.comparisons,
            "calibration": dict(self.calibration),
            "held_out": dict(self.held_out),
            "limit": asdict(self.limit) if self.limit else None,
            "dense": {**self.dense.to_document(), "bytes": self.dense_size},
            "points": [point.to_document() for point in self.points],
            "recommended": self.recommended,
            "smallest_within_limit": self.smallest_within_limit,
            "reason": self.reason,
            **self.made_with.to_document(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Sweep:
        """What :meth:`to_document` described.

        Raises:
            ValueError: when a recommended point is none of the points.
        """
        points = tuple(SweptPoint.from_document(entry) for entry in document["points"])
        places = [document.get(key) for key in ("recommended", "smallest_within_limit")]
        for place in places:
            if place is not None and not 0 <= int(place) < len(points):
                raise ValueError(f"there is no point {place}")
        limit, dense = document.get("limit"), document["dense"]
        return cls(
            model=str(document["model"]),
            fingerprint=document.get("fingerprint"),
            split=str(document.get("split") or ""),
            comparisons=int(document.get("comparisons") or 1),
            calibration=dict(document.get("calibration") or {}),
            held_out=dict(document.get("held_out") or {}),
            limit=Limit(str(limit["kind"]), float(limit["value"])) if limit else None,
            dense=Measured.from_document(dense),
            dense_size=None if dense.get("bytes") is None else int(dense["bytes"]),
            points=points,
            recommended=None if places[0] is None else int(places[0]),
            smallest_within_limit=None if places[1] is None else int(places[1]),
            reason=str(document.get("reason") or ""),
            made_with=MadeWith.from_document(document),
        )

    def point_of(self, selection: Selection | None) -> SweptPoint | None:
        """The point that is this selection, None where there is none; the recommended one for no selection."""
        if selection is None:
            return self.points[self.recommended] if self.recommended is not None else None
        wanted = (selection.scorer, selection.rule, selection.method.routed, selection.kept)
        made = {(p.method.scorer, p.method.rule, p.method.routed, p.kept): p for p in self.points[::-1]}
        return made.get(wanted)

    def recommends(self, selection: Selection | None) -> bool:
        """Whether a selection is the recommended one; true of none where there is one to recommend."""
        return self.recommended is not None and self.point_of(selection) == self.points[self.recommended]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's folder or its ``sweep.json``.

    Raises:
        CheckpointError: when there is no such file, or it is not JSON.
        DataError: when it is not a sweep of this format version; the message says what is wrong.
    """
    return read_result(path, SWEEP_FILE, "sweep", Sweep.from_document)
