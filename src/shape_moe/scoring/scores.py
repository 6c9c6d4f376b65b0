"""Scores of a whole model: from a trace through a scorer, or from a table of values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from os import PathLike
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shape_moe.documents import MOST_EXPERTS
from shape_moe.errors import DataError, ShapeMoeError, UsageError
from shape_moe.scoring.classes import joined
from shape_moe.scoring.registry import ScoreOptions, Scorer, get_scorer
from shape_moe.tracing.trace import Trace

COLUMNS = ("Layer", "Expert_ID", "Total_Activations", "Shapley_Value")


@dataclass(frozen=True)
class Scores:
    """One number per (layer, expert).

    Attributes:
        scorer: the scorer's name, or ``table`` for values that were read from a file.
        layers: decoder-layer index of every row.
        values: float64 [L, E], larger is more valuable.
        activations: float64 [L, E], tokens routed to the expert.
        class_activations: float64 [L, E], the same joined over classes as the values were, None where they were not;
            see :mod:`shape_moe.scoring.classes`.
    """

    scorer: str
    layers: tuple[int, ...]
    values: NDArray[np.float64]
    activations: NDArray[np.float64]
    class_activations: NDArray[np.float64] | None = None

    @property
    def joined(self) -> bool:
        """Whether the values are those of several classes, joined."""
        return self.class_activations is not None

    @property
    def tiebreak(self) -> NDArray[np.float64]:
        """What decides between equal values of a layer, larger first, float64 [L, E]."""
        return self.activations if self.class_activations is None else self.class_activations

    @property
    def num_experts(self) -> int:
        """Routed experts per layer."""
        return int(self.values.shape[1])

    def __repr__(self) -> str:
        return f"Scores({self.scorer!r}: {len(self.layers)} layers of {self.num_experts} experts)"

    def to_frame(self) -> pl.DataFrame:
        """The same as :meth:`table`, under the name that data frames go by."""
        return self.table()

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.table()._repr_html_()}"  # notebooks' own hook

    def table(self) -> pl.DataFrame:
        """The scores as a table with the columns :data:`COLUMNS`, best first within a layer."""
        layer = np.repeat(self.layers, self.num_experts)
        expert = np.tile(np.arange(self.num_experts), len(self.layers))
        columns = (layer, expert, self.activations.ravel(), self.values.ravel())
        frame = pl.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
        whole = self.activations == np.rint(self.activations)
        if whole.all():
            frame = frame.with_columns(pl.col("Total_Activations").cast(pl.Int64))
        keys = ["Layer", "Shapley_Value", "Total_Activations", "Expert_ID"]
        return frame.sort(keys, descending=[False, True, True, False])


def score_trace(trace: Trace, scorer: str = "shape", options: ScoreOptions | None = None) -> Scores:
    """Score the experts of a traced model.

    The scores of several classes of examples are joined by their maximum (:mod:`shape_moe.scoring.classes`), unless the
    options pool them; those of a scorer that looks at no statistics are the same for all classes.

    Raises:
        UsageError: for an unknown scorer, or one that needs what the trace does not hold.
        ShapeMoeError: when the scorer returns something else than finite numbers [L, E].
    """
    options = options or ScoreOptions()
    entry = get_scorer(scorer)
    if "coalitions" in entry.needs and "coalitions" in trace.info.left_out:
        raise UsageError(
            f"Scorer {scorer!r} needs coalitions, which this trace does not hold: {trace.info.left_out['coalitions']}. "
            "Use scorer 'imatrix-energy' or 'frequency', or trace the model."
        )
    missing = [name for name in entry.needs if name != "coalitions" and name not in trace.statistics]
    large = [f"{name} ({trace.info.left_out[name]})" for name in missing if name in trace.info.left_out]
    if large:
        raise UsageError(f"Scorer {scorer!r} needs {', '.join(large)}, which was left out of this trace.")
    if missing:
        what = f"Scorer {scorer!r} needs {', '.join(missing)}, which"
        if entry.needs == ("imatrix_energy",):
            raise UsageError(
                f"{what} only a trace holds that was made from an imatrix (shape-moe convert imatrix.gguf)."
            )
        if trace.info.engine == "transformers":
            raise UsageError(f"{what} this trace, made by an older version, does not hold: trace the model anew.")
        raise UsageError(
            f"{what} a trace made by {trace.info.engine} does not hold; "
            "use scorer 'shape' or 'frequency', or trace the model with Transformers."
        )
    options = replace(options, weights=entry.weights_for(trace, options.weights))
    activations = trace.sums("tokens", options.weights)
    if len(trace.info.classes) == 1 or options.pool_classes or not entry.needs:
        return Scores(scorer, trace.info.layers, _values(entry, trace, options), activations)
    classes = [trace.of_class(number) for number in range(len(trace.info.classes))]
    tokens = [part.sums("tokens", options.weights) for part in classes]
    values = [_values(entry, part, options) for part, found in zip(classes, tokens, strict=True) if found.any()]
    if not values:
        return Scores(scorer, trace.info.layers, np.zeros_like(activations), activations, activations)
    return Scores(
        scorer,
        trace.info.layers,
        joined(values, by_layer=options.by_layer),
        activations,
        joined(tokens, by_layer=True),
    )


def _values(scorer: Scorer, trace: Trace, options: ScoreOptions) -> NDArray[np.float64]:
    values = np.asarray(scorer.function(trace, options), dtype=np.float64)
    wanted = (len(trace.info.layers), trace.info.num_experts)
    if values.shape != wanted or not np.isfinite(values).all():
        raise ShapeMoeError(f"Scorer {scorer.name!r} must return finite numbers of shape {wanted}, not {values.shape}.")
    return values


def _check_numbers(column: pl.Series, path: Path) -> None:
    """Check that layers or experts have numbers that there can be, before anything is allocated by them."""
    numbers = column.cast(pl.Float64).to_numpy()
    if not (np.isfinite(numbers) & (numbers == np.rint(numbers)) & (numbers >= 0) & (numbers < MOST_EXPERTS)).all():
        raise DataError(f"{path}: {column.name} must be a whole number from 0 to {MOST_EXPERTS - 1:,} in every row.")


def read_scores(file: str | PathLike[str]) -> Scores:
    """Read a table of values (``VALUES.csv`` with the columns :data:`COLUMNS`).

    Raises:
        DataError: when the file is missing, lacks a column, or does not name every expert of every layer once.
    """
    path = Path(file)
    try:
        with path.open("rb") as stream:  # Polars reads patterns and ~ into the names of files
            frame = pl.read_csv(stream, columns=list(COLUMNS))
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a table of values: it needs the columns {', '.join(COLUMNS)}.") from error
    if frame.is_empty():
        raise DataError(f"{path} has no rows.")
    if frame.null_count().sum_horizontal().item() or not all(dtype.is_numeric() for dtype in frame.dtypes):
        raise DataError(f"{path}: every row needs a number in each of the columns {', '.join(COLUMNS)}.")
    for column in ("Layer", "Expert_ID"):
        _check_numbers(frame[column], path)
    frame = frame.sort("Layer", "Expert_ID")
    layers = frame["Layer"].unique(maintain_order=True).to_list()
    experts = int(frame["Expert_ID"].max()) + 1  # type: ignore[arg-type]  # numeric, checked above
    wanted = np.stack([np.repeat(layers, experts), np.tile(np.arange(experts), len(layers))], axis=1)
    if not np.array_equal(frame.select("Layer", "Expert_ID").to_numpy(), wanted):
        raise DataError(f"{path} must name each of the {experts} experts of each of the {len(layers)} layers once.")
    shape = (len(layers), experts)
    values = frame["Shapley_Value"].cast(pl.Float64).to_numpy().reshape(shape)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: values must be finite.")
    activations = frame["Total_Activations"].cast(pl.Float64).to_numpy().reshape(shape)
    return Scores("table", tuple(int(layer) for layer in layers), values, activations)
