"""Score a trace, and select experts from a trace or a table of values."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from shape_moe.architectures.moe_config import RoutingFacts
from shape_moe.scoring.registry import ScoreOptions
from shape_moe.scoring.scores import Scores, read_scores, score_trace
from shape_moe.selection.select import SelectOptions, select_from_scores, select_from_trace
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace, load_trace


@dataclass(frozen=True)
class SelectionJob:
    """How experts are scored and selected.

    Attributes:
        options: keep rate, rule, routing, target and constraints.
        scorer: name of the scorer.
        scoring: segment weights and seed.
    """

    options: SelectOptions
    scorer: str = "shape"
    scoring: ScoreOptions = field(default_factory=ScoreOptions)


def score(source: str | PathLike[str] | Trace, scorer: str = "shape", options: ScoreOptions | None = None) -> Scores:
    """Score a trace (a folder or an object), or read a table of values.

    Raises:
        ShapeMoeError: when the source or the scorer does not exist, or does not fit the other.
    """
    if isinstance(source, Trace):
        return score_trace(source, scorer, options)
    if Path(source).suffix.lower() == ".csv":
        return read_scores(source)
    return score_trace(load_trace(source), scorer, options)


def select(
    source: str | PathLike[str] | Trace | Scores,
    job: SelectionJob | SelectOptions | float,
    *,
    routing: RoutingFacts | None = None,
) -> Selection:
    """Select experts from a trace (a folder or an object) or from values (a ``.csv`` file or an object).

    Args:
        source: where values come from.
        job: how to score and select; a number is a keep rate for the published method.
        routing: facts about the model's routing; a table of values needs them to reroute.

    Raises:
        BudgetError: when the budget cannot be met under the constraints.
        ShapeMoeError: when source, scorer and options do not fit each other.
    """
    job = as_selection_job(job)
    if isinstance(source, Trace):
        return make_selection(source, job)
    if isinstance(source, Scores):
        return select_from_scores(source, job.options, routing=routing)
    if Path(source).suffix.lower() == ".csv":
        return select_from_scores(read_scores(source), job.options, routing=routing)
    return make_selection(load_trace(source), job)


def as_selection_job(job: SelectionJob | SelectOptions | float) -> SelectionJob:
    """A selection job from options, or from a keep rate alone."""
    if isinstance(job, SelectionJob):
        return job
    return SelectionJob(job if isinstance(job, SelectOptions) else SelectOptions(keep=job))


def make_selection(trace: Trace, job: SelectionJob) -> Selection:
    """Score a trace and select."""
    return select_from_trace(trace, job.options, scorer=job.scorer, scoring=job.scoring)
