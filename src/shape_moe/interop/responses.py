"""A file of server responses to a trace: what the traffic of a running model was routed to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.batches import CELLS, FOLDS, SEGMENTS
from shape_moe.errors import DataError
from shape_moe.interop.converted import converted_info
from shape_moe.interop.routed_experts import Served, cells_of, decode_response
from shape_moe.progress import SILENT, Progress
from shape_moe.tracing.coalitions import CoalitionTable, merge_tables, tabulate
from shape_moe.tracing.stored_statistics import Array
from shape_moe.tracing.trace import Trace

_COMPACT_ROWS = 50_000
"""Tokens whose experts are kept as they are before they are counted: memory does not grow with the file."""


def read_responses(file: Path, snapshot: Snapshot, *, skip_bad: bool = False, progress: Progress = SILENT) -> Trace:
    """Read a JSONL file of responses that carry ``routed_experts``; every response is one example.

    Args:
        file: one response per line, of vLLM or of SGLang.
        snapshot: the model that answered.
        skip_bad: leave responses that cannot be used out, and count them in the trace's ``source``.
        progress: where to show progress.

    Returns:
        A trace with coalitions and the statistics ``tokens`` and ``layer_tokens``.

    Raises:
        DataError: for a response that cannot be used, naming file and line; when both engines answered; when no
            response is left.
    """
    tally = _Tally(snapshot.moe_layers, snapshot.moe.num_experts, snapshot.moe.top_k)
    skipped: dict[str, str] = {}
    names: set[str] = set()
    engine: str | None = None
    digest = hashlib.sha256()
    with progress.phase("Reading responses", file.stat().st_size, "B") as advance:
        for where, line in _lines(file):
            digest.update(line)
            advance(len(line))
            if not line.strip():
                continue
            try:
                response = _as_response(line, where)
                served = decode_response(response, snapshot, where)
            except DataError as error:
                if not skip_bad:
                    raise
                skipped[where] = str(error)
                continue
            if engine not in (None, served.engine):
                raise DataError(
                    f"{where}: this response is of {served.engine}, those before are of {engine}; convert them apart "
                    "and merge the traces."
                )
            engine = served.engine
            names.add(str(response.get("model", "")))
            tally.add(served)
    if engine is None:
        why = f"; the first reason: {next(iter(skipped.values()))}" if skipped else ": it has no responses."
        raise DataError(f"No response of {file} could be used{why}")
    source = {
        "data": str(file),
        "content_hash": f"sha256:{digest.hexdigest()}",
        "served_as": sorted(names - {""}),
        "skipped": skipped,
    }
    tables, statistics = tally.tables(), tally.statistics()
    by_segment = statistics["layer_tokens"][0, 0].reshape(len(SEGMENTS), -1).sum(axis=1)
    tokens = {name: float(count) for name, count in zip(SEGMENTS, by_segment, strict=True)}
    info = converted_info(snapshot, engine=engine, tokens=tokens, examples=tally.examples, source=source)
    return Trace(info, statistics, dict(zip(info.layers, tables, strict=True)))


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            yield f"{file}, line {number}", line


def _as_response(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        response = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON.") from error
    if not isinstance(response, dict):
        raise DataError(f"{where}: a response must be a JSON object, not {type(response).__name__}.")
    return response


class _Tally:
    """Counts over responses, dealt into folds by their position."""

    def __init__(self, layers: tuple[int, ...], num_experts: int, top_k: int) -> None:
        self.shape = (len(layers), 1, len(CELLS), FOLDS)
        self.examples = 0
        self._experts = num_experts
        self._tokens = np.zeros((*self.shape, num_experts), dtype=np.int64)
        self._layer_tokens = np.zeros(self.shape, dtype=np.int64)
        self._tables = [tabulate(np.zeros((0, top_k), np.int16), np.zeros(0, np.int64), np.zeros(0, np.int64))] * len(
            layers
        )
        self._ids: list[NDArray[np.int16]] = []
        self._cells: list[NDArray[np.int64]] = []

    def add(self, served: Served) -> None:
        """Count one response."""
        fold = self.examples % FOLDS
        rows = np.arange(self.shape[0])[None, :, None] * self._experts
        for cell, ids in cells_of(served):
            counts = np.bincount((rows + ids).ravel(), minlength=self.shape[0] * self._experts)
            self._tokens[:, 0, cell, fold] += counts.reshape(self.shape[0], self._experts)
            self._layer_tokens[:, 0, cell, fold] += len(ids)
            self._ids.append(ids)
            self._cells.append(np.full(len(ids), cell * FOLDS + fold))
        self.examples += 1
        if sum(len(ids) for ids in self._ids) > _COMPACT_ROWS:
            self._compact()

    def _compact(self) -> None:
        members = np.concatenate(self._ids)
        cells, folds = np.divmod(np.concatenate(self._cells), FOLDS)
        segments, predicting = np.divmod(cells, len(SEGMENTS))
        for row, table in enumerate(self._tables):
            new = tabulate(members[:, row], segments, folds, predicting)
            self._tables[row] = merge_tables([table, new], [1, 1])
        self._ids, self._cells = [], []

    def tables(self) -> list[CoalitionTable]:
        """The coalition table of every MoE layer."""
        if self._ids:
            self._compact()
        return self._tables

    def statistics(self) -> dict[str, Array]:
        """The statistics that follow from expert ids alone."""
        return {"tokens": self._tokens, "layer_tokens": self._layer_tokens}
