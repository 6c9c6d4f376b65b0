"""Score a trace, and select experts from a trace or a table of values."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from shape_moe.architectures.moe_config import RoutingFacts
from shape_moe.errors import UsageError
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.scoring.scores import Scores, read_scores, score_trace
from shape_moe.selection.select import SelectOptions, check_feasible, select_from_scores, select_from_trace
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace, load_trace

AUTO = "auto"
"""The scorer that stands for trying several."""


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


def as_selection_job(job: SelectionJob | SelectOptions | float) -> SelectionJob:
    """A selection job from options, or from a keep rate alone."""
    if isinstance(job, SelectionJob):
        return job
    return SelectionJob(job if isinstance(job, SelectOptions) else SelectOptions(keep=job))


def score(source: str | PathLike[str] | Trace, scorer: str = "shape", options: ScoreOptions | None = None) -> Scores:
    """Score a trace (a folder or an object), or read a table of values.

    Raises:
        ShapeMoeError: when the source or the scorer does not exist, or does not fit the other.
    """
    if isinstance(source, Trace):
        return score_trace(source, scorer, options)
    if is_table(source):
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
    _refuse_auto(job)
    if isinstance(source, Scores):
        return select_from_scores(source, job.options, routing=routing)
    if not isinstance(source, Trace) and is_table(source):
        return select_from_scores(read_scores(source), job.options, routing=routing)
    trace = source if isinstance(source, Trace) else load_trace(source)
    return select_from_trace(trace, job.options, scorer=job.scorer, scoring=job.scoring)


def is_table(source: str | PathLike[str]) -> bool:
    """Whether a source is a table of values rather than a trace."""
    return Path(source).suffix.lower() == ".csv"


def _refuse_auto(job: SelectionJob) -> None:
    if job.scorer == AUTO:
        raise UsageError("Scorer auto tries candidates on held-out examples, which `shape-moe prune` does.")


def check_job(
    job: SelectionJob, layers: tuple[int, ...], experts: int, routing: RoutingFacts, *, automatic: bool = False
) -> None:
    """Check a selection job against a model, before anything is traced.

    Args:
        job: the job.
        layers: the model's MoE layers.
        experts: routed experts per layer.
        routing: facts about its routing.
        automatic: whether scorer ``auto`` can be served, because candidates are judged.

    Raises:
        UsageError: for an unknown scorer, one that cannot value this model's experts, or contradicting options.
        BudgetError: when the budget cannot be met under the constraints.
    """
    if not automatic:
        _refuse_auto(job)
    if job.scorer != AUTO and not (scorer := get_scorer(job.scorer)).can_value(routing.top_k):
        raise UsageError(
            f"Scorer {scorer.name} needs top-{scorer.least_top_k} routing or more, and this model's is "
            f"top-{routing.top_k}: its values would say nothing; use --scorer reap."
        )
    check_feasible(job.options, layers, experts, routing)
