"""Models that were made together at several keep rates, as one table: on every card, in the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shape_moe.evaluation.verdict import Verdict
from shape_moe.text import in_markdown
from shape_moe.units import NONE, kl_at_least, readable_kl, readable_share, readable_size
from shape_moe.workspace import write_json, write_text

SERIES_FILE = "series.json"
FORMAT_VERSION = 1
HEADINGS = ("model", "experts kept", "weights", "of the original", "verdict", "largest fall", "largest KL")


@dataclass(frozen=True)
class SeriesModel:
    """One model of a series.

    Attributes:
        name: its folder or file, within that of the series.
        keep_asked: the keep rate that was asked for.
        kept: experts kept over all layers.
        total: experts of the original.
        size: bytes of its tensors.
        whole: bytes of the original's.
        verdict: what pruning did to it, None where it was not judged.
        rejected: whether it is not as good as it was required to be.
    """

    name: str
    keep_asked: float
    kept: int
    total: int
    size: int
    whole: int
    verdict: Verdict | None = None
    rejected: bool = False

    def cells(self) -> tuple[str, ...]:
        """Its row of the table, as :data:`HEADINGS` name the columns."""
        return (
            self.name,
            f"{self.kept:,} of {self.total:,} ({readable_share(self.kept / self.total)})",
            readable_size(self.size),
            readable_share(self.size / self.whole),
            *_judged(self.verdict),
        )

    def to_document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "keep_asked": self.keep_asked,
            "keep": self.kept / self.total,
            "kept": self.kept,
            "total": self.total,
            "bytes": self.size,
            "verdict": str(self.verdict.word) if self.verdict is not None else None,
            "rejected": self.rejected,
        }


def _judged(verdict: Verdict | None) -> tuple[str, str, str]:
    """Verdict, the class that fell most, and the largest divergence of any class."""
    if verdict is None:
        return "not judged", NONE, NONE
    falls = verdict.falls
    if not falls:
        return str(verdict.word), NONE, NONE
    worst = falls[0]
    name = f"{worst.name}: " if worst.name else ""
    fall = f"{name}{worst.figure} {readable_share(worst.shares[0])} -> {readable_share(worst.shares[1])}"
    most = max((fall for fall in falls if fall.kl is not None), key=lambda fall: fall.kl or 0.0, default=None)
    if most is None or most.kl is None:
        return str(verdict.word), fall, NONE
    return str(verdict.word), fall, (kl_at_least if most.kl_is_bound else readable_kl)(most.kl)


@dataclass(frozen=True)
class Series:
    """Models of one trace and one method, each within the next larger one.

    Attributes:
        models: largest first.
    """

    models: tuple[SeriesModel, ...]

    def table(self) -> list[str]:
        """The table in Markdown, line by line."""
        rows = [HEADINGS, ("---",) * len(HEADINGS), *(model.cells() for model in self.models)]
        return [
            f"| {' | '.join(cell if i == 1 else in_markdown(cell) for cell in row)} |" for i, row in enumerate(rows)
        ]

    def write(self, folder: Path, title: str, lines: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Write the series' own card and ``series.json``.

        Args:
            folder: of the series.
            title: what was pruned.
            lines: how, a paragraph each.
            facts: what else the JSON says.
        """
        told = [f"# {in_markdown(title)}", *(in_markdown(line) for line in lines), "\n".join(self.table())]
        told.append(
            "Every expert that a smaller model keeps, each larger one keeps too. All were judged by the same examples, "
            "which calibration has not seen. Each model has a card of its own; `shape/trace` holds what they were "
            "made from."
        )
        write_text(folder / "README.md", "\n\n".join(told) + "\n")
        models = [model.to_document() for model in self.models]
        write_json(folder / SERIES_FILE, {"format_version": FORMAT_VERSION, **facts, "models": models})
