"""Coalition counts as JSON: ``{"0": {"3,17,42": 5, ...}, ...}``, tokens by set of experts and decoder layer.

No file of the reference implementation with coalitions is published. This is the layout of its published files (layers
as keys, ``_metadata`` beside them) around the counts that the method is defined by; a key may also be written as a
tuple or a list, ``"(3, 17, 42)"``. Such a file tells neither segments nor halves of the data apart.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shape_moe.architectures.snapshot import Snapshot
from shape_moe.calibration.batches import CELLS, FOLDS, RESPONSE
from shape_moe.errors import DataError
from shape_moe.interop.converted import converted_info
from shape_moe.interop.reference import read_layers
from shape_moe.tracing.coalitions import COUNT_COLUMNS, CoalitionTable, add_up
from shape_moe.tracing.trace import Trace

_SET = re.compile(r"[(\[]?\s*\d+(\s*,\s*\d+)*\s*,?\s*[)\]]?")
_LARGEST = 2**53
_CELL = CELLS.index("response")
"""All tokens are counted as response; which of them predict one is not known."""
_FOLD = 1
"""Everything is counted in one odd fold: the half of the even ones is empty, so no stability is claimed."""


def read_coalitions(file: Path, snapshot: Snapshot) -> Trace:
    """Read coalition counts; all tokens count as response tokens of one half of the data.

    Args:
        file: the file.
        snapshot: the model that was traced.

    Returns:
        A trace with coalitions and the statistics ``tokens`` and ``layer_tokens``.

    Raises:
        DataError: naming the layer and the set of experts that is not this model's.
    """
    layers, _ = read_layers(file)
    if tuple(layers) != snapshot.moe_layers:
        raise DataError(
            f"{file} has {len(layers)} layers, {min(layers)} to {max(layers)}, but the model's MoE layers are "
            f"{len(snapshot.moe_layers)}, {snapshot.moe_layers[0]} to {snapshot.moe_layers[-1]}."
        )
    tables = {layer: _table(counts, snapshot, f"{file}: layer {layer}") for layer, counts in layers.items()}
    totals = np.array([table.counts[:, RESPONSE].sum() for table in tables.values()], dtype=np.float64)
    if not totals[0] > 0 or not np.allclose(totals, totals[0], rtol=1e-9):
        raise DataError(
            f"{file}: every token passes every MoE layer, but the layers' counts add up to {totals.min():g} to "
            f"{totals.max():g}; the file is not complete."
        )
    kind = np.result_type(*(table.counts for table in tables.values()))
    shape = (len(tables), 1, len(CELLS), FOLDS)
    tokens, layer_tokens = np.zeros((*shape, snapshot.moe.num_experts), kind), np.zeros(shape, kind)
    for row, table in enumerate(tables.values()):
        counts = table.counts[:, RESPONSE]
        np.add.at(tokens[row, 0, _CELL, _FOLD], table.members, counts[:, None])
        layer_tokens[row, 0, _CELL, _FOLD] = counts.sum()
    info = converted_info(
        snapshot,
        engine="a file of coalition counts",
        tokens={"prompt": 0.0, "response": float(totals[0])},
        examples=0,
        source={"data": str(file)},
    )
    return Trace(replace(info, cells=2), {"tokens": tokens, "layer_tokens": layer_tokens}, tables)


def coalitions_text(trace: Trace) -> str:
    """A trace's coalition counts as the content of such a file, prompt and response added up."""
    document = {
        str(layer): {
            ",".join(map(str, members)): count
            for members, count in zip(table.members.tolist(), table.weighted().tolist(), strict=True)
        }
        for layer, table in ((layer, table.pooled()) for layer, table in trace.coalitions.items())
    }
    return json.dumps(document, indent=2)


def _table(counts: Any, snapshot: Snapshot, where: str) -> CoalitionTable:
    if not isinstance(counts, dict) or not counts:
        raise DataError(f"{where} must be an object of token counts by set of experts.")
    members = np.array([_members(key, snapshot, where) for key in counts], dtype=np.int64)
    tokens = _counts(counts, where)
    columns = np.zeros((len(members), len(COUNT_COLUMNS)), dtype=tokens.dtype)
    columns[:, RESPONSE] = tokens
    seen = tokens > 0  # a set that served no token was not observed
    return add_up(members[seen], columns[seen])


def _members(key: str, snapshot: Snapshot, where: str) -> list[int]:
    ids = sorted(int(number) for number in re.findall(r"\d+", key)) if _SET.fullmatch(key.strip()) else []
    top_k, experts = snapshot.moe.top_k, snapshot.moe.num_experts
    if len(set(ids)) != top_k or len(ids) != top_k or ids[-1] >= experts:
        raise DataError(f"{where}: {key!r} is not a set of {top_k} different experts between 0 and {experts - 1}.")
    return ids


def _counts(counts: dict[str, Any], where: str) -> NDArray[Any]:
    for key, count in counts.items():
        if type(count) not in (int, float) or not 0 <= count < _LARGEST:
            raise DataError(f"{where}: the count of {key!r} must be a number of tokens, not {count!r}.")
    whole = all(float(count).is_integer() for count in counts.values())
    return np.array(list(counts.values()), dtype=np.int64 if whole else np.float64)
