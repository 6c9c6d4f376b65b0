"""Score a trace, and select experts from a trace or a table of values."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from shape_moe.architectures.moe_config import RouterFacts
from shape_moe.errors import UsageError
from shape_moe.progress import Progress
from shape_moe.scoring.registry import ScoreOptions, get_scorer
from shape_moe.scoring.scores import Scores, read_scores, score_trace
from shape_moe.selection.select import SelectOptions, check_feasible, select_from_scores, select_from_trace
from shape_moe.selection.selection import Selection
from shape_moe.tracing.trace import Trace, load_trace

AUTO = "auto"
"""The scorer that stands for trying several."""


def as_select_options(given: SelectOptions | float) -> SelectOptions:
    """Options from themselves, or from a keep rate alone: the published method."""
    return given if isinstance(given, SelectOptions) else SelectOptions(keep=given)


def opened(source: str | PathLike[str], progress: Progress) -> Trace | Scores:
    """A trace or a table of values by its path; what there is to know of a trace is noted.

    Raises:
        ShapeMoeError: when it cannot be read.
    """
    if is_table(source):
        return read_scores(source)
    trace = load_trace(source)
    for remark in trace.remarks:
        progress.note(remark)
    return trace


def score(
    source: str | PathLike[str] | Trace | Scores, scorer: str = "shape", options: ScoreOptions | None = None
) -> Scores:
    """Score a trace (a folder or an object), or read a table of values (values that are there already stay).

    Raises:
        ShapeMoeError: when the source or the scorer does not exist, or does not fit the other.
    """
    if isinstance(source, Scores):
        return source
    if isinstance(source, Trace):
        return score_trace(source, scorer, options)
    if is_table(source):
        return read_scores(source)
    return score_trace(load_trace(source), scorer, options)


def select(
    source: str | PathLike[str] | Trace | Scores,
    options: SelectOptions | float,
    *,
    routing: RouterFacts | None = None,
) -> Selection:
    """Select experts from a trace (a folder or an object) or from values (a ``.csv`` file or an object).

    Args:
        source: where values come from.
        options: how to score and select; a number is a keep rate for the published method.
        routing: facts about the model's router; a table of values needs them to reroute.

    Raises:
        BudgetError: when the budget cannot be met under the constraints.
        ShapeMoeError: when source, scorer and options do not fit each other.
    """
    options = as_select_options(options)
    _refuse_auto(options)
    if isinstance(source, Scores):
        return select_from_scores(source, options, routing=routing)
    if not isinstance(source, Trace) and is_table(source):
        return select_from_scores(read_scores(source), options, routing=routing)
    trace = source if isinstance(source, Trace) else load_trace(source)
    selection = select_from_trace(trace, options)
    return replace(selection, warnings=(*selection.warnings, *_warn_of_changes(trace)))


def _warn_of_changes(trace: Trace) -> list[str]:
    """What has become of the model that was traced, where it lies where it did."""
    known, folder = trace.info.traced_files, Path(trace.info.model)
    changed = known.changed(folder) if known is not None and folder.is_dir() else None
    return [f"The model {folder} is not as it was traced: {changed}. Trace it anew."] if changed else []


def is_table(source: str | PathLike[str]) -> bool:
    """Whether a source is a table of values rather than a trace."""
    return Path(source).suffix.lower() == ".csv"


def _refuse_auto(options: SelectOptions) -> None:
    if options.method.scorer == AUTO:
        raise UsageError("Scorer auto tries candidates on held-out examples, which `shape-moe prune` does.")


def check_options(
    options: SelectOptions, layers: tuple[int, ...], experts: int, routing: RouterFacts, *, automatic: bool = False
) -> None:
    """Check options against a model, before anything is traced.

    Args:
        options: what is asked of a selection.
        layers: the model's MoE layers.
        experts: routed experts per layer.
        routing: facts about its router.
        automatic: whether scorer ``auto`` can be served, because candidates are judged.

    Raises:
        UsageError: for an unknown scorer, one that cannot value this model's experts, or contradicting options.
        BudgetError: when the budget cannot be met under the constraints.
    """
    if not automatic:
        _refuse_auto(options)
    name = options.method.scorer
    if name != AUTO and not (scorer := get_scorer(name)).can_value(routing.top_k):
        raise UsageError(
            f"Scorer {scorer.name} needs top-{scorer.least_top_k} routing or more, and this model's is "
            f"top-{routing.top_k}: its values would say nothing; use --scorer reap."
        )
    check_feasible(options, layers, experts, routing)
