"""An imatrix as a trace: tokens per expert, and an estimate of the experts' output energy; no coalitions.

For an expert with down projection ``D`` and what it is multiplied with, ``u``, the output is ``E = D u``, and::

    sum_t |E|^2 = sum_{c,d} <D_c, D_d> sum_t u_tc u_td  ~  sum_c |D_c|^2 sum_t u_tc^2

with ``D_c`` the columns. The imatrix holds the sums of squares; products of different columns are left out, which is
exact where either the columns are orthogonal or what they are multiplied with is uncorrelated.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.architectures.tensor_names import down_projection
from shape_moe.calibration.batches import CELLS, FOLDS
from shape_moe.errors import DataError, UnsupportedModelError
from shape_moe.interop.converted import converted_info
from shape_moe.interop.imatrix import Entry, Imatrix, read_imatrix
from shape_moe.progress import SILENT, Progress
from shape_moe.tracing.coalitions import COUNT_COLUMNS, CoalitionTable
from shape_moe.tracing.statistics import Layout
from shape_moe.tracing.trace import Trace
from shape_moe.units import joined

ENGINE = "llama.cpp's imatrix"
ENERGY = "imatrix_energy"
_CELL, _FOLD = CELLS.index("response"), 1
NO_COALITIONS = "an imatrix counts experts one by one, not which of them serve a token together"


def read_imatrix_trace(file: Path, snapshot: Snapshot, progress: Progress = SILENT) -> Trace:
    """Read an imatrix of a model as a trace.

    Args:
        file: the imatrix, of either format.
        snapshot: the model, a GGUF file or a folder: its down projections are read, one expert at a time.
        progress: where to show progress.

    Returns:
        A trace with the statistics ``tokens``, ``layer_tokens`` and ``imatrix_energy``.

    Raises:
        DataError: when it is damaged, or of another model.
        UnsupportedModelError: when the model's weights cannot be read.
    """
    imatrix = read_imatrix(file)
    layers, moe = snapshot.moe_layers, snapshot.moe
    shape = (len(layers), 1, len(CELLS), FOLDS)
    tokens = np.zeros((*shape, moe.num_experts), dtype=np.float64)
    energy, layer_tokens = np.zeros_like(tokens), np.zeros(shape, dtype=np.float64)
    with progress.phase("Reading down projections", len(layers), "layer") as advance:
        for row, layer in enumerate(layers):
            entry = imatrix.experts(layer, "down", moe.num_experts)
            if entry is None:
                raise DataError(f"{file} holds no down projections of layer {layer}: it is of another model.")
            counts = _tokens(entry)
            tokens[row, 0, _CELL, _FOLD] = counts
            energy[row, 0, _CELL, _FOLD] = np.where(counts > 0, _energies(entry, snapshot, layer), 0.0)
            layer_tokens[row, 0, _CELL, _FOLD] = counts.sum() / moe.top_k
            advance(1)
    total = float(layer_tokens.sum(axis=(1, 2, 3)).max())
    if not total > 0:
        raise DataError(f"{file}: no token was routed to any expert.")
    info = converted_info(
        snapshot,
        engine=ENGINE,
        tokens={"prompt": 0.0, "response": total},
        examples=imatrix.chunks,
        source={"imatrix": str(file), "texts": list(imatrix.datasets), "remarks": remarks(imatrix)},
    )
    table = CoalitionTable(np.zeros((0, moe.top_k), dtype=np.int64), np.zeros((0, len(COUNT_COLUMNS)), dtype=np.int64))
    held = {"tokens": tokens, "layer_tokens": layer_tokens, ENERGY: energy}
    layouts = {
        "tokens": Layout("expert", "sum"),
        "layer_tokens": Layout("layer", "sum"),
        ENERGY: Layout("expert", "sum"),
    }
    left_out = {"coalitions": NO_COALITIONS}
    return Trace(replace(info, cells=2, left_out=left_out), held, dict.fromkeys(layers, table), layouts)


def remarks(imatrix: Imatrix) -> list[str]:
    """What who uses such a trace should know."""
    texts = f" ({joined(imatrix.datasets)})" if imatrix.datasets else ""
    found = [
        f"The experts were counted on the text that the imatrix was made from{texts}: as a rule general text, not your "
        "task. What only your task uses may be removed; trace your own examples to keep it."
    ]
    if imatrix.legacy:
        found.append(
            "This imatrix has llama.cpp's older format, which keeps means and no tokens per expert: every expert that "
            "was used at all counts alike, and imatrix-energy compares energy per token."
        )
    return found


def _tokens(entry: Entry) -> NDArray[np.float64]:
    """Tokens per expert; in the older format the number of calls for every expert that was used."""
    if len(entry.counts) > 1:
        return entry.counts.astype(np.float64)
    calls = float(entry.counts[0])
    unused = (entry.sums == entry.counts[0]).all(axis=1) | ~entry.sums.any(axis=1)
    return np.where(unused, 0.0, calls)


def _energies(entry: Entry, snapshot: Snapshot, layer: int) -> NDArray[np.float64]:
    """``sum_c |D_c|^2 sums_c`` of every expert, float64 [E]."""
    found = np.zeros(len(entry.sums))
    for expert, sums in enumerate(entry.sums):
        squares = _column_squares(snapshot, layer, expert)
        if squares.shape != sums.shape:
            raise DataError(
                f"The imatrix is of another model: its experts of layer {layer} have {sums.size} inner columns, those "
                f"of {snapshot.name} {squares.size}."
            )
        found[expert] = float(squares @ sums.astype(np.float64))
    return found


def _column_squares(snapshot: Snapshot, layer: int, expert: int) -> NDArray[np.float64]:
    """Squared norms of the columns of an expert's down projection, float64 [inner]."""
    family, hidden = snapshot.moe.family, int(snapshot.config["hidden_size"])
    for tensor in snapshot.plain_expert(layer, expert):
        if down_projection(family, tensor.name) == "down_proj":
            values = tensor.values().double()
            rows, columns = values.shape
            transposed = rows != hidden if rows != columns else family.projections is None and not family.packed
            return np.asarray(values.square().sum(dim=1 if transposed else 0).numpy())
    raise UnsupportedModelError(f"{snapshot.name}: the down projections of layer {layer} are not understood.")
