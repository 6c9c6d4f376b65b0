"""The trace: what one calibration pass leaves, as a versioned folder that other tools can open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.calibration.batches import FOLDS, SEGMENTS
from shape_moe.documents import MOST_EXPERTS, as_shape
from shape_moe.errors import CheckpointError, FingerprintError, UsageError
from shape_moe.json_file import read_json
from shape_moe.source_files import changed_file
from shape_moe.traced_files import TracedFiles
from shape_moe.tracing.coalitions import CoalitionTable, merge_tables, read_table, write_table
from shape_moe.tracing.statistics import HALVES, Layout, get_statistic
from shape_moe.units import counted
from shape_moe.workspace import write_text

FORMAT_VERSION = 1
Array = NDArray[Any]
"""float64, or int64 where a statistic counts."""


@dataclass(frozen=True)
class SegmentWeights:
    """How much a token counts when a trace is scored, by segment."""

    prompt: float = 1.0
    response: float = 1.0

    def __post_init__(self) -> None:
        if not (self.prompt >= 0 and self.response >= 0 and self.prompt + self.response > 0):
            raise UsageError("Segment weights must not be negative, and one of them must be positive.")


@dataclass(frozen=True)
class TraceInfo:
    """Where a trace comes from, and the shape of what it describes.

    Attributes:
        fingerprint: identifies the model by its routers.
        layout_fingerprint: describes the checkpoint's tensors; a difference is only a warning.
        model: name of the model as the user gave it.
        revision: commit of a hub model.
        family: model type.
        num_experts: routed experts per MoE layer (``E``).
        routing: experts per token (``k``) and what else a selection must know about routing.
        layers: decoder-layer indices of the rows of every statistic.
        tokens: traced tokens by segment.
        examples: traced examples.
        engine: what ran the model.
        implementation: experts implementation whose logits the traced run reproduced.
        dtype: dtype of the experts while tracing.
        source: the calibration set: where it came from and how it was tokenised.
        versions: package versions.
        canary: token sequences from the calibration set that later checks run.
        traced_files: the model's weights as they were; None where no folder was traced, and in older traces.
    """

    fingerprint: str
    layout_fingerprint: str
    model: str
    family: str
    num_experts: int
    routing: RouterFacts
    layers: tuple[int, ...]
    tokens: dict[str, int | float]
    examples: int
    revision: str | None = None
    engine: str = "transformers"
    implementation: str = "grouped_mm"
    dtype: str = "bfloat16"
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    canary: list[list[int]] = field(default_factory=list)
    traced_files: TracedFiles | None = None

    @property
    def top_k(self) -> int:
        """Experts per token (``k``)."""
        return self.routing.top_k


@dataclass(frozen=True)
class Trace:
    """One calibration pass over one model, or several put together.

    Attributes:
        info: origin and shape.
        statistics: arrays by name, see :mod:`shape_moe.tracing.statistics`.
        coalitions: the coalition table of every layer.
        layouts: axes and reduction of statistics by name, for those of packages that may not be installed here.
    """

    info: TraceInfo
    statistics: Mapping[str, Array]
    coalitions: Mapping[int, CoalitionTable]
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    def layout(self, name: str) -> Layout:
        """Axes and reduction of a statistic that the trace holds."""
        return self.layouts[name] if name in self.layouts else get_statistic(name).layout

    def sums(self, name: str, weights: SegmentWeights | None = None) -> NDArray[np.float64]:
        """A statistic over the whole trace: folds and weighted segments added (or maximised).

        Returns:
            float64 [L, E] for per-expert statistics, [L] for per-layer ones, [L, E, E] for pairs.

        Raises:
            UsageError: when the trace does not hold the statistic.
        """
        if name not in self.statistics:
            raise UsageError(
                f"The trace holds no {name!r}: it was made by {self.info.engine}, which records "
                f"{', '.join(sorted(self.statistics)) or 'coalitions only'}. Trace the model with Transformers instead."
            )
        weights = weights or SegmentWeights()
        values = np.asarray(self.statistics[name], dtype=np.float64)
        factors = (weights.prompt, weights.response)
        if self.layout(name).reduction == "max":
            used = [i for i, factor in enumerate(factors) if factor > 0]
            return np.asarray(values[:, used].max(axis=(1, 2)))
        by_segment = values.sum(axis=2)
        return np.asarray(factors[0] * by_segment[:, 0] + factors[1] * by_segment[:, 1])

    def half(self, half: Literal[0, 1]) -> Trace:
        """The trace of one half of the examples alone (0: even folds, 1: odd folds)."""
        return replace(
            self,
            statistics=_HalfView(self.statistics, half),
            coalitions={layer: table.half(half) for layer, table in self.coalitions.items()},
        )

    @staticmethod
    def merge(traces: Sequence[Trace], weights: Sequence[float] | None = None) -> Trace:
        """Put traces of one model together, see :func:`merge_traces`."""
        return merge_traces(traces, weights)

    def __repr__(self) -> str:
        info = self.info
        tokens = sum(info.tokens.values())
        return (
            f"Trace({info.model!r}: {len(info.layers)} layers of {info.num_experts} experts, {info.top_k} per token; "
            f"{counted(info.examples, 'example')}, {counted(tokens, 'token')})"
        )

    def to_frame(self) -> pl.DataFrame:
        """One row per (layer, expert), one column per statistic of single experts.

        What it shows is the sum (or the largest value) over the whole trace, every token counted alike.
        """
        layers, experts = self.info.layers, self.info.num_experts
        columns: dict[str, Array] = {
            "layer": np.repeat(np.asarray(layers), experts),
            "expert": np.tile(np.arange(experts), len(layers)),
        }
        names = [name for name in self.statistics if self.layout(name).axes == "expert"]
        return pl.DataFrame({**columns, **{name: self.sums(name).ravel() for name in names}})

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.to_frame()._repr_html_()}"  # notebooks' own hook

    def save(self, folder: Path) -> None:
        """Write the trace into an existing or new folder."""
        from safetensors.numpy import save_file

        (folder / "coalitions").mkdir(parents=True, exist_ok=True)
        for layer, table in self.coalitions.items():
            write_table(table, _coalition_file(folder, layer))
        save_file({name: np.ascontiguousarray(a) for name, a in self.statistics.items()}, _statistics_file(folder))
        spec = {name: asdict(self.layout(name)) for name in self.statistics}
        document = {"format_version": FORMAT_VERSION, **asdict(self.info), "statistics": spec}
        write_text(folder / "trace.json", json.dumps(document, indent=1) + "\n")


def load_trace(path: str | PathLike[str]) -> Trace:
    """Open a trace folder; statistics are read when they are first used.

    Raises:
        CheckpointError: when the folder is not a trace, is damaged or was written by a newer version.
    """
    folder = Path(path)
    if not (folder / "trace.json").is_file():
        raise CheckpointError(f"{folder} is not a trace: it has no trace.json.")
    document = read_json(folder / "trace.json")
    if document.pop("format_version", None) != FORMAT_VERSION:
        raise CheckpointError(f"{folder} was written in another format version; trace the model anew.")
    layouts = as_shape(document.pop("statistics", {}), dict[str, Layout], folder / "trace.json", "a trace")
    info = as_shape(document, TraceInfo, folder / "trace.json", "a trace")
    _check_shape(info, folder)
    coalitions = {layer: _read_coalitions(_coalition_file(folder, layer), info) for layer in info.layers}
    held = _LazyStatistics(_statistics_file(folder), info, layouts)
    return Trace(info, held, coalitions, layouts)


def _check_shape(info: TraceInfo, folder: Path) -> None:
    """Check counts before anything is allocated by them."""
    layers = info.layers
    if not 1 <= info.top_k <= info.num_experts <= MOST_EXPERTS:
        raise CheckpointError(
            f"{folder / 'trace.json'} is not a trace: {info.top_k} of {info.num_experts} experts cannot serve a token."
        )
    if not layers or min(layers) < 0 or list(layers) != sorted(set(layers)):
        raise CheckpointError(f"{folder / 'trace.json'} is not a trace: its layers must be different and ascending.")


def _read_coalitions(file: Path, info: TraceInfo) -> CoalitionTable:
    table = read_table(file, info.top_k)
    if table.members.size and not 0 <= table.members.min() <= table.members.max() < info.num_experts:
        raise CheckpointError(f"{file} names experts that the model does not have: it has {info.num_experts}.")
    if not (np.isfinite(table.counts).all() and (table.counts >= 0).all()):
        raise CheckpointError(f"{file} holds counts that are no finite, non-negative numbers.")
    return table


def merge_traces(traces: Sequence[Trace], weights: Sequence[float] | None = None) -> Trace:
    """Put traces of the same model together: sums are added (times a weight each), maxima are kept.

    Coalitions and counts are exact in any order (with weights that are no whole numbers: to within rounding). Other
    sums are added in the order in which the traces are given; another order may change their last bits.

    Raises:
        FingerprintError: when the traces are of different models.
        UsageError: for no traces, or weights that do not fit them.
    """
    weights = list(weights) if weights is not None else [1.0] * len(traces)
    if not traces:
        raise UsageError("There is nothing to merge: give at least one trace.")
    if len(weights) != len(traces) or min(weights) < 0 or max(weights) <= 0:
        raise UsageError(
            f"{len(traces)} traces need {len(traces)} weights that are not negative, one of them positive."
        )
    first = traces[0].info
    for trace in traces[1:]:
        same = ("fingerprint", "num_experts", "routing", "layers")
        if any(getattr(trace.info, key) != getattr(first, key) for key in same):
            raise FingerprintError("The traces are of different models: their fingerprints or layers differ.")
        if trace.info.traced_files is not None and (changed := _changed_between(first, trace.info)) is not None:
            raise FingerprintError(f"{changed} between the traces, so they are of different models.")
    names = [name for name in traces[0].statistics if all(name in trace.statistics for trace in traces)]
    layouts = {name: traces[0].layout(name) for name in names}
    merged = {
        name: _merge_statistic(layout, [t.statistics[name] for t in traces], weights)
        for name, layout in layouts.items()
    }
    coalitions = {layer: merge_tables([t.coalitions[layer] for t in traces], weights) for layer in first.layers}
    return Trace(_merge_infos([t.info for t in traces], weights), merged, coalitions, layouts)


def _changed_between(first: TraceInfo, second: TraceInfo) -> str | None:
    """The file of one folder that changed between two traces of it, None where none did."""
    before, after = first.traced_files, second.traced_files
    if before is None or after is None or before.place != after.place:
        return None
    return changed_file(before.files, after.files)


def _merge_statistic(layout: Layout, arrays: list[Array], weights: list[float]) -> Array:
    if layout.reduction == "max":
        return np.asarray(np.maximum.reduce([a for a, w in zip(arrays, weights, strict=True) if w > 0]))
    if all(w == 1 for w in weights):
        return np.asarray(sum(arrays[1:], start=arrays[0]))
    return np.asarray(sum(a.astype(np.float64) * w for a, w in zip(arrays, weights, strict=True)))


def _merge_infos(infos: list[TraceInfo], weights: list[float]) -> TraceInfo:
    tokens = {key: sum(info.tokens[key] for info in infos) for key in infos[0].tokens}
    canary = [sequence for group in zip(*(info.canary for info in infos), strict=False) for sequence in group]
    source = {"merged": [{"weight": w, **info.source} for info, w in zip(infos, weights, strict=True)]}
    return replace(
        infos[0],
        tokens=tokens,
        examples=sum(info.examples for info in infos),
        canary=canary[: max(len(info.canary) for info in infos)],
        source=source if len(infos) > 1 else infos[0].source,
    )


def _coalition_file(folder: Path, layer: int) -> Path:
    return folder / "coalitions" / f"layer-{layer:03d}.parquet"


def _statistics_file(folder: Path) -> Path:
    return folder / "statistics.safetensors"


def _shape(info: TraceInfo, layout: Layout) -> tuple[int, ...]:
    cells = (len(info.layers), len(SEGMENTS), HALVES if layout.axes == "pair" else FOLDS)
    return cells + (info.num_experts,) * {"layer": 0, "expert": 1, "pair": 2}[layout.axes]


class _LazyStatistics(Mapping[str, Array]):
    """Arrays of a statistics file, read on first use (Gram matrices of large models take hundreds of MB)."""

    def __init__(self, file: Path, info: TraceInfo, layouts: Mapping[str, Layout]) -> None:
        self._file, self._info, self._layouts, self._read = file, info, layouts, dict[str, Array]()

    def __getitem__(self, name: str) -> Array:
        if name not in self._layouts:
            raise KeyError(name)
        if name not in self._read:
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(self._file, framework="numpy") as tensors:
                    found = tensors.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._file} is missing or damaged.") from error
            wanted = _shape(self._info, self._layouts[name])
            if found.shape != wanted or not np.isfinite(found).all():
                raise CheckpointError(
                    f"{self._file} is damaged: {name} must be finite numbers of shape {wanted}, not {found.shape}."
                )
            self._read[name] = found
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


class _HalfView(Mapping[str, Array]):
    """Statistics restricted to the even (0) or odd (1) folds."""

    def __init__(self, whole: Mapping[str, Array], half: Literal[0, 1]) -> None:
        self._whole, self._half = whole, half

    def __getitem__(self, name: str) -> Array:
        step = slice(self._half, None, 2)
        return self._whole[name][:, :, step]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)
