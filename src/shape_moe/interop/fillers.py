"""Recorded routing as what fills a trace: see :class:`shape_moe.tracing.engine.Filler`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.interop.coalition_counts import read_coalitions
from shape_moe.interop.imatrix_trace import read_imatrix_trace
from shape_moe.interop.kinds import Kind
from shape_moe.interop.responses import read_responses
from shape_moe.progress import SILENT, Progress
from shape_moe.tracing.engine import Filler
from shape_moe.tracing.trace import Trace


@dataclass(frozen=True)
class _Recorded:
    """A file that somebody else wrote, and the model it is about."""

    file: Path
    snapshot: Snapshot
    skip_bad: bool = False
    progress: Progress = SILENT


@dataclass(frozen=True)
class RecordedResponses(_Recorded):
    """Responses of a server that carry ``routed_experts``; see :func:`shape_moe.interop.responses.read_responses`."""

    def fill(self, folder: Path | None) -> Trace:
        """Read the file; nothing is kept in the folder, because reading starts anew in no time."""
        del folder
        return read_responses(self.file, self.snapshot, skip_bad=self.skip_bad, progress=self.progress)


@dataclass(frozen=True)
class RecordedCoalitions(_Recorded):
    """Coalition counts; see :func:`shape_moe.interop.coalition_counts.read_coalitions`."""

    def fill(self, folder: Path | None) -> Trace:
        """Read the file."""
        del folder
        return read_coalitions(self.file, self.snapshot)


@dataclass(frozen=True)
class RecordedImatrix(_Recorded):
    """An imatrix of llama.cpp; see :func:`shape_moe.interop.imatrix_trace.read_imatrix_trace`."""

    def fill(self, folder: Path | None) -> Trace:
        """Read the file, and the model's down projections."""
        del folder
        return read_imatrix_trace(self.file, self.snapshot, self.progress)


FILLERS: dict[Kind, Callable[[Path, Snapshot, bool, Progress], Filler]] = {
    "responses": RecordedResponses,
    "coalitions": RecordedCoalitions,
    "imatrix": RecordedImatrix,
}
"""By the kind of file."""
