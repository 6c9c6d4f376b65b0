"""The trace: what one calibration pass leaves, as a versioned folder that other tools can open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.architectures.same_routers import RouterHashes
from shape_moe.calibration.batches import CELLS
from shape_moe.documents import MOST_EXPERTS, as_shape
from shape_moe.errors import CheckpointError, FingerprintError, UsageError
from shape_moe.json_file import read_json
from shape_moe.source_files import changed_file
from shape_moe.traced_files import TracedFiles
from shape_moe.tracing.classes import NO_CLASS, check_classes, class_names, in_classes
from shape_moe.tracing.coalitions import CoalitionTable, merge_tables, read_table, write_table
from shape_moe.tracing.statistics import AXES, MOST_CLASSES, Layout, get_statistic
from shape_moe.tracing.stored_statistics import Array, PartOf, StoredStatistics
from shape_moe.tracing.token_weights import PredictingWeights, SegmentWeights, TokenWeights
from shape_moe.tracing.trace_format_1 import FormatOneStatistics, todays_layouts
from shape_moe.units import capitalised, counted
from shape_moe.workspace import write_text

FORMAT_VERSION = 2


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
        classes: names of the classes of examples that are kept apart, in the order of their axis; the empty name is
            that of examples without a class.
        cells: 4, or 2 where it is not known which tokens predict a response: all are counted as if they did not.
        left_out: statistics that were not recorded, and why.
        routers: hashes of the model's router rows, by which it is recognised when it is stored otherwise (see
            :mod:`shape_moe.architectures.same_routers`); None for a live model, and in older traces.
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
    classes: tuple[str, ...] = (NO_CLASS,)
    cells: Literal[2, 4] = 4
    left_out: dict[str, str] = field(default_factory=dict)
    routers: RouterHashes | None = None

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

    @property
    def lacks(self) -> str | None:
        """What the trace cannot tell that others can, None where there is nothing."""
        if self.info.cells == len(CELLS):
            return None
        return "the trace does not tell which tokens predict a response (it has an older format, or was converted)"

    @property
    def remarks(self) -> tuple[str, ...]:
        """What who uses the trace should know of it, in sentences."""
        found = [f"{capitalised(self.lacks)}: scorers count all tokens alike."] if self.lacks else []
        found += [f"The trace is made without {name}: {reason}." for name, reason in self.info.left_out.items()]
        found += map(str, self.info.source.get("remarks") or ())
        return tuple(found)

    def sums(self, name: str, weights: TokenWeights | None = None) -> NDArray[np.float64]:
        """A statistic over the whole trace: classes, folds and weighted cells added (or maximised).

        Args:
            name: the statistic's name.
            weights: how much tokens count; None counts all alike.

        Returns:
            float64 [L, E] for per-expert statistics, [L] for per-layer ones, [L, E, E] for pairs.

        Raises:
            UsageError: when the trace does not hold the statistic, or cannot tell tokens apart as the weights do.
        """
        if name in self.info.left_out:
            raise UsageError(f"The trace holds no {name!r}: {self.info.left_out[name]}.")
        if name not in self.statistics:
            raise UsageError(
                f"The trace holds no {name!r}: it was made by {self.info.engine}, which records "
                f"{', '.join(sorted(self.statistics)) or 'coalitions only'}. Trace the model with Transformers instead."
            )
        weights = weights or SegmentWeights()
        self.check_weights(weights)
        values = np.asarray(self.statistics[name], dtype=np.float64)
        if self.layout(name).reduction == "max":
            used = [cell for factor, cells in weights.parts if factor > 0 for cell in cells]
            return np.asarray(values[:, :, used].max(axis=(1, 2, 3)))
        by_cell = values.sum(axis=3).sum(axis=1)
        (first, (a, b)), (second, (c, d)) = weights.parts
        return np.asarray(first * (by_cell[:, a] + by_cell[:, b]) + second * (by_cell[:, c] + by_cell[:, d]))

    def check_weights(self, weights: TokenWeights) -> None:
        """Check that the trace can tell tokens apart as weights do.

        Raises:
            UsageError: where it cannot.
        """
        if self.lacks and isinstance(weights, PredictingWeights):
            raise UsageError(f"Tokens cannot be weighted by what they predict: {self.lacks}. Trace the model anew.")

    def half(self, half: Literal[0, 1]) -> Trace:
        """The trace of one half of the examples alone (0: even folds, 1: odd folds)."""
        return replace(
            self,
            statistics=PartOf(self.statistics, lambda array: array[:, :, :, half::2]),
            coalitions={layer: table.half(half) for layer, table in self.coalitions.items()},
        )

    def of_class(self, number: int) -> Trace:
        """The trace of one class of examples alone; ``info`` counts the tokens and examples of all."""
        return replace(
            self,
            info=replace(self.info, classes=(self.info.classes[number],)),
            statistics=PartOf(self.statistics, lambda array: array[:, number : number + 1]),
            coalitions={layer: table.of_class(number) for layer, table in self.coalitions.items()},
        )

    @staticmethod
    def merge(traces: Sequence[Trace], weights: Sequence[float] | None = None, *, pool: bool = False) -> Trace:
        """Put traces of one model together, see :func:`merge_traces`."""
        return merge_traces(traces, weights, pool=pool)

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
        axes = {name: list(names) for name, names in AXES.items()}
        document = {"format_version": FORMAT_VERSION, **asdict(self.info), "axes": axes, "statistics": spec}
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
    version = document.pop("format_version", None)
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(f"{folder} was written in another format version; trace the model anew.")
    document.pop("axes", None)  # for other readers: the format's version says as much
    layouts = as_shape(document.pop("statistics", {}), dict[str, Layout], folder / "trace.json", "a trace")
    info = as_shape(document, TraceInfo, folder / "trace.json", "a trace")
    info = replace(info, cells=2) if version == 1 else info
    _check_shape(info, folder)
    coalitions = {layer: _read_coalitions(_coalition_file(folder, layer), info, version) for layer in info.layers}
    file, size = _statistics_file(folder), (len(info.layers), len(info.classes), info.num_experts)
    if version == 1:
        old = FormatOneStatistics(file, layouts, len(info.layers), info.num_experts)
        return Trace(info, old, coalitions, todays_layouts(layouts))
    held = StoredStatistics(file, layouts, lambda layout: layout.shape(*size))
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
    if not 1 <= len(set(info.classes)) == len(info.classes) <= MOST_CLASSES:
        raise CheckpointError(
            f"{folder / 'trace.json'} is not a trace: it must have 1 to {MOST_CLASSES} classes of different names."
        )


def _read_coalitions(file: Path, info: TraceInfo, version: int) -> CoalitionTable:
    table = read_table(file, info.top_k, format_version=version)
    if table.classes.size and not 0 <= table.classes.min() <= table.classes.max() < len(info.classes):
        raise CheckpointError(f"{file} names classes that the trace does not have: it has {len(info.classes)}.")
    if table.members.size and not 0 <= table.members.min() <= table.members.max() < info.num_experts:
        raise CheckpointError(f"{file} names experts that the model does not have: it has {info.num_experts}.")
    if not (np.isfinite(table.counts).all() and (table.counts >= 0).all()):
        raise CheckpointError(f"{file} holds counts that are no finite, non-negative numbers.")
    return table


def merge_traces(traces: Sequence[Trace], weights: Sequence[float] | None = None, *, pool: bool = False) -> Trace:
    """Put traces of the same model together: sums are added (times a weight each), maxima are kept.

    Coalitions and counts are exact in any order (with weights that are no whole numbers: to within rounding). Other
    sums are added in the order in which the traces are given; another order may change their last bits.

    Classes of one name become one. A trace without classes is, beside others, the class of its data: traces of one
    data set (parts of the work) are pooled, and those of several data sets kept apart, unless ``pool`` says that they
    are parts of one.

    Raises:
        FingerprintError: when the traces are of different models.
        UsageError: for no traces, weights that do not fit them, or too many classes.
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
    named = class_names([trace.info for trace in traces], pool=pool)
    classes = tuple(sorted({name for names in named for name in names}))
    check_classes(classes)
    traces = [in_classes(trace, names, classes) for trace, names in zip(traces, named, strict=True)]
    info = _merge_infos([t.info for t in traces], weights)
    names = [name for name in traces[0].statistics if all(name in trace.statistics for trace in traces)]
    layouts = {name: traces[0].layout(name) for name in names}
    size = (len(info.layers), len(classes), info.num_experts)
    large = {name: reason for name, layout in layouts.items() if (reason := layout.too_large(*size))}
    layouts = {name: layout for name, layout in layouts.items() if name not in large}
    merged = {
        name: _merge_statistic(layout, [t.statistics[name] for t in traces], weights)
        for name, layout in layouts.items()
    }
    coalitions = {layer: merge_tables([t.coalitions[layer] for t in traces], weights) for layer in first.layers}
    return Trace(replace(info, left_out={**info.left_out, **large}), merged, coalitions, layouts)


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
        cells=min(info.cells for info in infos),
        left_out={name: reason for info in infos for name, reason in info.left_out.items()},
    )


def _coalition_file(folder: Path, layer: int) -> Path:
    return folder / "coalitions" / f"layer-{layer:03d}.parquet"


def _statistics_file(folder: Path) -> Path:
    return folder / "statistics.safetensors"
